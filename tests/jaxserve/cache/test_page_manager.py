"""Pages have as many owners as say so, a writer is alone, and a key finds what it names."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.cache.page_manager import PageManager, chain, root_key

PAGE = 4
ROOTS = (root_key("model", "float32", "exact"), root_key("model", "float32", "tainted"))


class Owner:
    """A sequence as the manager sees it: pages, and what was written to each of them."""

    def __init__(self, root: bytes):
        self.root = root
        self.pages: list[int] = []
        self.written: list[list[int]] = []

    def keys(self) -> list[bytes]:
        keys: list[bytes] = []
        for tokens in self.written:
            if len(tokens) < PAGE:
                break
            keys.append(chain(keys[-1] if keys else self.root, tokens))
        return keys


class Pages(RuleBasedStateMachine):
    """Sequences grow, fork, write, publish, match and leave; `contents` is the device's memory."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.manager = PageManager(num_pages, PAGE)
        self.owners: list[Owner] = []
        self.contents: dict[int, list[int]] = {p: [] for p in range(num_pages)}
        self.seen: dict[bytes, tuple[bytes, list[int]]] = {}  # key -> its parent and tokens

    def owner(self, data: st.DataObject) -> Owner:
        return self.owners[data.draw(st.integers(0, len(self.owners) - 1), "owner")]

    @rule(root=st.sampled_from(ROOTS))
    def arrive(self, root: bytes) -> None:
        self.owners.append(Owner(root))

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), token=st.integers(0, 1))
    def write(self, data: st.DataObject, token: int) -> None:
        """Appends a token, to a page of its own: a new one, or a copy of a shared one."""
        owner = self.owner(data)
        grows = not owner.written or len(owner.written[-1]) == PAGE
        shared = not grows and not self.manager.is_writable(owner.pages[-1], known=True)
        if (grows or shared) and not self.manager.num_free:
            return
        if grows:
            owner.pages += self.manager.allocate(1)
            owner.written.append([])
            self.contents[owner.pages[-1]] = []
        elif shared:
            old, (new,) = owner.pages[-1], self.manager.allocate(1)
            self.contents[new] = list(self.contents[old])
            self.manager.release([old])
            owner.pages[-1] = new
        holders = [o for o in self.owners if owner.pages[-1] in o.pages]
        assert holders == [owner], "a page that two sequences count on was about to be written"
        owner.written[-1] = [*owner.written[-1], token]
        self.contents[owner.pages[-1]] = list(owner.written[-1])

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        owner = self.owner(data)
        child = Owner(owner.root)
        child.pages, child.written = list(owner.pages), list(owner.written)
        self.manager.share(owner.pages)
        self.owners.append(child)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        owner = self.owner(data)
        self.owners.remove(owner)
        self.manager.release(owner.pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        owner = self.owner(data)
        parent = owner.root
        for page, key, tokens in zip(owner.pages, owner.keys(), owner.written, strict=False):
            self.manager.publish(page, key)
            self.seen[key] = (parent, tokens)
            parent = key

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def match(self, data: st.DataObject) -> None:
        """A newcomer with a prompt seen before takes what is cached of it, and it is true."""
        keys = [data.draw(st.sampled_from(sorted(self.seen)), "key")]
        while keys[0] not in ROOTS:
            keys.insert(0, self.seen[keys[0]][0])
        newcomer = Owner(keys[0])
        found = self.manager.match(keys[1:])
        self.manager.share(found)
        newcomer.pages = found
        newcomer.written = [self.seen[key][1] for key in keys[1 : len(found) + 1]]
        self.owners.append(newcomer)

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.seen)), "key")
        self.manager.withdraw([key])
        assert not self.manager.match([key])

    @rule()
    def forget(self) -> None:
        self.manager.forget()
        assert not any(self.manager.match([key]) for key in self.seen)

    @invariant()
    def free_and_owned_are_all(self) -> None:
        owned = {page for owner in self.owners for page in owner.pages}
        assert self.manager.num_free + len(owned) == self.manager.num_pages

    @invariant()
    def shared_means_two_owners(self) -> None:
        for page in range(self.manager.num_pages):
            count = sum(page in owner.pages for owner in self.owners)
            assert self.manager.is_writable(page, known=True) == (count == 1)

    @invariant()
    def owners_see_what_they_wrote(self) -> None:
        for owner in self.owners:
            assert [self.contents[page] for page in owner.pages] == owner.written

    @invariant()
    def keys_find_what_they_name(self) -> None:
        for key, (_, tokens) in self.seen.items():
            for page in self.manager.match([key]):
                assert self.contents[page] == tokens


Pages.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)
TestPages = Pages.TestCase


def test_a_chain_names_all_tokens_before_it():
    root = root_key("model")
    assert chain(chain(root, [1, 2]), [3, 4]) != chain(chain(root, [2, 1]), [3, 4])
    assert chain(root, [1, 2]) == chain(root, (1, 2))
    assert chain(root, [1, 23]) != chain(root, [12, 3])


@pytest.mark.parametrize("other", [("m", "float32", "int8-cache"), ("m", "bfloat16"), ("mf", "")])
def test_what_changes_keys_and_values_changes_every_key(other: tuple[str, ...]):
    """An approximate cache, another adapter or element type never answers an exact look-up."""
    manager = PageManager(4, PAGE)
    exact, tainted = root_key("m", "float32"), root_key(*other)
    (page,) = manager.allocate(1)
    manager.publish(page, chain(tainted, range(PAGE)))
    assert manager.match([chain(tainted, range(PAGE))]) == [page]
    assert manager.match([chain(exact, range(PAGE))]) == []


def test_names_in_a_root_do_not_run_together():
    assert root_key("ab", "c") != root_key("a", "bc")


def test_empty_pages_go_before_cached_ones_and_old_ones_before_new():
    manager = PageManager(5, PAGE)
    old, new = manager.allocate(2), manager.allocate(2)
    keys = {page: chain(root_key(str(page)), range(PAGE)) for page in old + new}
    for page, key in keys.items():
        manager.publish(page, key)
    manager.release(old)
    manager.release(new)
    order = manager.allocate(5)
    assert order[0] not in keys
    assert order[1:] == [*reversed(old), *reversed(new)]  # the beginning of a prompt lives longest


def test_a_hit_makes_a_page_young_again():
    manager = PageManager(2, PAGE)
    first, second = manager.allocate(2)
    for page in (first, second):
        manager.publish(page, chain(root_key(str(page)), range(PAGE)))
        manager.release([page])
    manager.share([first])
    manager.release([first])
    assert manager.allocate(1) == [second]


def test_the_first_page_with_a_key_keeps_it():
    manager = PageManager(2, PAGE)
    first, second = manager.allocate(2)
    key = chain(root_key("m"), range(PAGE))
    manager.publish(first, key)
    manager.publish(second, key)
    assert manager.match([key]) == [first]
    manager.release([first, second])
    assert manager.allocate(1) == [second], "nobody can find it, so it holds nothing of use"


def test_a_match_ends_at_the_first_gap():
    manager = PageManager(3, PAGE)
    keys = [chain(root_key(str(i)), range(PAGE)) for i in range(3)]
    pages = manager.allocate(3)
    manager.publish(pages[0], keys[0])
    manager.publish(pages[2], keys[2])
    assert manager.match(keys) == [pages[0]]


def test_what_the_index_says_of_a_page_stays_true():
    manager = PageManager(4, 2)
    (page,) = manager.allocate(1)
    assert manager.is_writable(page)
    manager.publish(page, chain(root_key("model"), [1, 2]))
    assert not manager.is_writable(page), "somebody may find it, and read other tokens"
    assert manager.is_writable(page, known=True), "the same tokens again change nothing"
