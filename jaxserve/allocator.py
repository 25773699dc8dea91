"""Memory that a step gives back stays in the process, for the next step.

XLA:CPU takes the temporaries of a step from malloc and frees them after it. glibc maps blocks of
more than 32 MiB from the system each time and returns them each time, so every step touches each
of its pages for the first time: a third of a training step was spent on that.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of mallopt(3)


@functools.cache
def keep_freed_memory() -> bool:
    """Asks glibc not to return memory to the system; whether it could be asked.

    The process then stays as large as it has been at most. The setting holds for the whole
    process and has no way back. It must come before JAX's first computation, as threads that have
    taken memory before keep their ways. Without glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        log.debug("no mallopt here: temporaries of steps are mapped anew each time")
        return False
    # One arena, as the others cannot grow past 64 MiB and map what is larger in spite of MMAP_MAX.
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
