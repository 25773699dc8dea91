"""Compilation: kept between processes, counted, and, after warm-up, forbidden on request."""

from __future__ import annotations

import logging
from typing import Any

import jax

from jaxserve.errors import CompileForbiddenError
from kernels_pallas.cpu.build import cache_dir

log = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"


def keep_programs() -> None:
    """Turns the persistent compile cache on, unless the user has set one up.

    jax keys it by program, jaxlib version, flags and device; a second start compiles nothing.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        if (root := cache_dir()) is None:
            log.warning("compiled programs are not kept: no home folder; set JAXSERVE_CACHE_DIR")
            return
        jax.config.update("jax_compilation_cache_dir", str(root / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class CompileWatch:
    """Counts compilations of this process, and those that the cache spared."""

    def __init__(self) -> None:
        self.compiled = 0
        self.loaded = 0
        self._forbidden_by: set[object] = set()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def forbid(self, owner: object) -> None:
        """Until `allow`, a compilation in this process raises CompileForbiddenError."""
        self._forbidden_by.add(owner)

    def allow(self, owner: object) -> None:
        """Takes back what `owner` forbade."""
        self._forbidden_by.discard(owner)

    def _on_event(self, event: str, **_: object) -> None:
        if event == _HIT:
            self.loaded += 1

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event != _COMPILED:
            return
        self.compiled += 1
        if self._forbidden_by:
            raise CompileForbiddenError(
                "a program was compiled after warm-up: an array shape or type that no bucket "
                "covers, or an eager jax operation on the serving path"
            )


watch = CompileWatch()
"""One for the process: jax's listeners cannot be taken off one by one."""
