"""Huge pages for what XLA:CPU takes from malloc.

XLA:CPU takes a step's temporaries from malloc and frees them after it, and glibc maps blocks of
more than 32 MiB from the system each time. With pages of 4 KiB a third of a training step was spent
on touching them for the first time; with pages of 2 MiB next to nothing is. (Asking glibc to keep
what is freed came to the same time, but blocks break up there: the process became twice as large.)
"""

from __future__ import annotations

import os
import sys

_SETTING = "glibc.malloc.hugetlb=1"


def restart_with_huge_pages() -> None:
    """Starts this process over, unless malloc takes huge pages already: glibc reads that only once.

    For the beginning of a command whose process is its own. Other systems are left alone; where
    huge pages are forbidden, nothing changes but for the start.
    """
    settings = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in settings:
        os.environ["GLIBC_TUNABLES"] = f"{settings}:{_SETTING}".removeprefix(":")
        os.execv(sys.executable, sys.orig_argv)
