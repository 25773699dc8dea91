"""doctor: what this machine has, what a model would need, and what to change if it does not fit"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import platform
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jaxserve import __version__
from jaxserve.cli.options import add_engine_options, engine_settings
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, JaxServeError

Rows = Iterator[tuple[str, str]]

_PACKAGES = ("jax", "jaxlib", "numpy", "tokenizers", "llguidance", "starlette", "uvicorn")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("model", nargs="?", help="a checkpoint to plan for; nothing is loaded")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what it finds; 1 if the model cannot be served with these settings."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    _print(console, "machine", _machine())
    if args.model is None:
        return 0
    settings = engine_settings(args)
    revision = settings.pop("revision")
    checkpoint = Checkpoint.read(args.model, revision)
    _print(console, args.model, checkpoint.rows())
    config = EngineConfig.of(settings)
    try:
        plan = checkpoint.plan(config)
    except ConfigError as error:
        console.print(f"does not fit: {error}", style="bold red", markup=False)
        found = nearest(checkpoint, config)
        advice = f"try {_options(config, found)}" if found else "no setting helps here"
        console.print(advice, style="bold", markup=False)
        return 1
    _print(console, "plan", _planned(plan))
    return 0


def _print(console: Any, title: str, rows: Rows) -> None:
    console.print(title, style="bold", markup=False)
    for name, value in rows:
        console.print(f"  {name:<16} {value}", markup=False)


# ---- the machine ------------------------------------------------------------------------


def _machine() -> Rows:
    from kernels_pallas.cpu.build import cache_dir

    yield "jaxserve", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    yield from _devices()
    yield "native kernels", native_kernels()
    own = None if (root := cache_dir()) is None else root / "xla"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or own
    nowhere = "none: no home folder; set JAXSERVE_CACHE_DIR"
    yield "compile cache", _cache_state(Path(folder)) if folder else nowhere


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _devices() -> Rows:
    import jax

    from jaxserve.plan import default_device, memory_limit

    try:
        default_device()
    except ConfigError as error:
        yield "devices", f"none: {error}"
        return
    for device in jax.devices():
        free = memory_limit(device) / 2**30
        kind = "" if device.device_kind == device.platform else f" {device.device_kind}"
        cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
        yield f"device {device.id}", f"{device.platform}{kind}{cores}, {free:.1f} GiB to be had"


def native_kernels() -> str:
    """Whether the C++ kernels can run here, or why not, as their builder logs it."""
    import kernels_pallas.cpu

    heard = _Ear()
    log = logging.getLogger("kernels_pallas.cpu.build")
    level, propagate = log.level, log.propagate
    log.addHandler(heard)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        available = kernels_pallas.cpu.available()
    finally:
        log.removeHandler(heard)
        log.setLevel(level)
        log.propagate = propagate
    return "available" if available else heard.last or "not available"


class _Ear(logging.Handler):
    """Keeps the last message."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def _cache_state(folder: Path) -> str:
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return f"{folder}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"


# ---- a model ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What planning needs of a checkpoint: its configuration, but not its weights."""

    folder: Path
    raw: dict[str, Any]
    model: Any
    family: Any

    @classmethod
    def read(cls, name: str, revision: str | None) -> Checkpoint:
        """Reads `config.json`; raises CheckpointError where it cannot be served at all."""
        from jaxserve.checkpoint import hf, hub
        from jaxserve.models.family import family

        folder = hub.resolve(name, revision)
        raw = hf.read_config(folder)
        kind = family(raw.get("model_type", ""))
        model = hf.model_config(kind, raw)
        return cls(folder, raw, model, kind)

    def num_params(self) -> int:
        """Elements of the weights."""
        import jax

        from sharding.tree import is_weight

        leaves = jax.tree.leaves(self.family.declare_params(self.model), is_leaf=is_weight)
        return sum(math.prod(w.shape(self.model.sizes)) for w in leaves)

    def plan(self, config: EngineConfig) -> Any:
        """What an engine would decide; raises ConfigError if it cannot work."""
        from jaxserve import plan
        from jaxserve.checkpoint import cache_scales
        from jaxserve.quant import weights
        from jaxserve.weights import held_in_int8

        held = weights.is_large
        if any(self.folder.glob("*.safetensors")):
            held = held_in_int8(self.folder, self.family, self.model, self.raw, config)
        layers, shape, scales = self.model.num_layers, self.model.kv_shape, None
        if config.kv_cache_dtype == "int8":
            scales = cache_scales.load(self.folder, layers, shape)
        return plan.resolve(
            config,
            self.raw,
            self.model,
            partial(weights.weight_bytes, self.family, self.model, in_int8=held),
            plan.default_device(),
            kv_calibrated=scales is not None,
        )

    def rows(self) -> Rows:
        """The checkpoint in words."""
        yield "family", self.raw["model_type"]
        yield "parameters", f"{self.num_params() / 1e6:,.1f} M in {self.model.num_layers} layers"
        yield "positions", f"{self.model.max_len:,}"
        files = list(self.folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 2**20
        yield "weights", f"{len(files)} files, {size:,.1f} MiB" if files else "no safetensors here"


def _planned(plan: Any) -> Rows:
    for part in plan.describe().split(", "):
        yield "", part
    sizes = {
        kind: ", ".join(str(size) for k, size in sorted(plan.programs) if k == kind)
        for kind in ("step", "forward", "sample")
    }
    yield "programs", f"whole steps of {sizes['step']} sequences"
    yield "", f"forward passes of {sizes['forward']} tokens, sampling of {sizes['sample']} rows"


def nearest(checkpoint: Checkpoint, asked: EngineConfig) -> EngineConfig | None:
    """The least changed settings that work, if there are any."""
    for tried in _candidates(asked):
        try:
            plan = checkpoint.plan(tried)
        except JaxServeError:  # or scales of a cache that only this candidate reads
            continue
        if asked.max_model_len is not None:
            shorter = min(asked.max_model_len, plan.max_model_len)
            tried = dataclasses.replace(tried, max_model_len=shorter)
        return tried
    return None


def _candidates(asked: EngineConfig) -> Iterator[EngineConfig]:
    """Settings ever further from what was asked: shorter, fuller, narrower, and together."""
    change = dataclasses.replace
    fuller = {"memory_utilization": max(asked.memory_utilization, 0.95)}
    narrower, rounded = {"dtype": "bfloat16"}, {"quantization": "int8"}
    for other in ({}, fuller, narrower, fuller | narrower):
        yield from _shorter(change(asked, **other))
    for field in dataclasses.fields(EngineConfig):  # one that cannot be had here
        if getattr(asked, field.name) != field.default:
            yield change(asked, **{field.name: field.default})
    pages = {"kv_cache_dtype": "int8"}
    for other in (pages, rounded, rounded | fuller, rounded | fuller | narrower):
        yield from _shorter(change(asked, **other))
    yield from _shorter(change(asked, **rounded, **fuller, **narrower, **pages))


def _shorter(base: EngineConfig) -> Iterator[EngineConfig]:
    yield base
    yield dataclasses.replace(base, max_model_len=None)
    yield dataclasses.replace(base, max_model_len=None, num_pages=None)


def _options(asked: EngineConfig, found: EngineConfig) -> str:
    """What differs, as it is typed."""
    changed: list[str] = []
    for field in dataclasses.fields(EngineConfig):
        before, after = getattr(asked, field.name), getattr(found, field.name)
        option = field.name.replace("_", "-")
        if before == after:
            continue
        if isinstance(after, bool):
            changed.append(f"--{option}" if after else f"--no-{option}")
        else:
            changed.append(f"no --{option}" if after is None else f"--{option} {after}")
    return " ".join(changed) or "the same again: memory has been freed since"
