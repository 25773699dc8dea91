"""Who owns which page: reference counts, copy on write, and the prefix index.

A page is in one of three states. *Owned*: some sequence counts on it. *Cached*: nobody does, but
it still holds keys that are worth matching; it waits in `_free`, oldest first, until somebody needs
the room. *Free*: it waits in front of all cached ones.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page: of its own tokens and, through `parent`, of all before them."""
    return hashlib.blake2b(parent + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


def root_key(*identity: str) -> bytes:
    """The parent of a sequence's first page.

    Whatever changes keys and values enters here: model, element type, adapter, and the taint of any
    approximate method, so that its pages never satisfy an exact lookup.
    """
    return hashlib.blake2b("\0".join(identity).encode(), digest_size=16).digest()


class PageManager:
    """A fixed pool of pages. Host integers only; nothing here touches a device."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._refs = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be allocated, cached ones included."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes pages for one owner; cached contents are forgotten, least recently used first.

        The caller has checked `num_free`.
        """
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        page, _ = self._free.popitem(last=False)
        if (key := self._key_of.pop(page, None)) is not None:
            del self._page_of[key]
        self._refs[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Adds an owner to each page, cached ones included."""
        for page in pages:
            if self._refs[page] == 0:
                del self._free[page]
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Takes one owner off each page. The last pages of a sequence are forgotten first."""
        for page in reversed(pages):
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free[page] = None
                if page not in self._key_of:
                    self._free.move_to_end(page, last=False)

    def is_writable(self, page: int, known: bool = False) -> bool:
        """Whether its owner may write to it, and nobody sees anything else than before.

        Args:
            known: what is written is what the index says of the page.
        """
        return self._refs[page] == 1 and (known or page not in self._key_of)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix. They are not owned yet: `share` them."""
        pages = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Makes a full page findable. The first page with a key keeps it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def withdraw(self, keys: Iterable[bytes]) -> None:
        """Lets nobody match these keys until they are published again; owners keep the pages."""
        for key in keys:
            if (page := self._page_of.pop(key, None)) is not None:
                del self._key_of[page]
                if self._refs[page] == 0:
                    self._free.move_to_end(page, last=False)

    def forget(self) -> None:
        """Empties the prefix index: the contents of all pages are about to change."""
        self._page_of.clear()
        self._key_of.clear()
