"""What was decided: all that an engine derives from the settings, the model and the device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kernels_pallas.cpu
from jaxserve.cache.kv_cache import page_bytes, storage_dtype, stored_shape
from jaxserve.checkpoint.schemes import scheme
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.split import (
    ASYNCHRONOUS,
    decode_steps_of,
    dispatch_of,
    is_interleaved,
    parallelism_of,
    sizes_on_device,
)
from kernels_pallas.paged_attention import SHARED_KEYS
from kernels_pallas.target import Target
from moe.dispatch import Dispatch
from sharding.mesh import Parallelism

FIRST_BUCKET = 64
"""Tokens of the program that is compiled first and serves until the others exist."""

_GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Sizes of a running engine; hashable, printed at start-up.

    Attributes:
        dtype: of weights.
        quantization: "int8" where large weights are held in eight bits, but for those that a
            checkpoint of int8 keeps in floats.
        activation_dtype: of hidden states. On CPU float32, which its vector units are quicker at.
        kv_dtype: in which pages are stored. int8 and int4 are rounded, with scales of their own.
        parallelism: how devices share the work; everything else here is of one of them.
        splits_kv_heads: KV heads, and so pages, are split over the axis "tensor".
        group_pages: pages in a block of keys, of which sequences with a common beginning share
            whole ones; 0 where they are not to, where kernels know no groups, or where no sequence
            is longer than that.
        interleaved: two halves of a step's tokens take turns, layer by layer.
        dispatch: how tokens reach experts on other devices, where there are any.
        kv_calibrated: int8 pages have scales that came with the checkpoint, for each lane.
        kv_shape: KV heads, and lanes of a key and of a value, of a page.
        target: the hardware that programs are compiled for.
        token_buckets: tokens per step that have a program, ascending.
        kernels: "native" (C++ on CPU), "pallas" (on a TPU or a GPU) or "reference". While a
            machine's first start builds the native ones, steps run the reference over the same
            weights and cache.
        judges: a reward head looks at the hidden states of searches' paths.
        notes_routes: steps say which experts their tokens have visited.
        refines: there are programs that route a token in several ways and mix what comes of it.
        unrolled: every layer is a stack of its own, where XLA would copy a slice of a stack before
            it uses it: on a GPU, and on CPU without native kernels.
    """

    platform: str
    target: Target
    dtype: Any
    quantization: str | None
    activation_dtype: Any
    kv_dtype: Any
    kv_calibrated: bool
    kv_shape: tuple[int, int, int]
    max_model_len: int
    max_num_seqs: int
    token_buckets: tuple[int, ...]
    page_size: int
    num_pages: int
    kernels: str
    unrolled: bool
    decode_steps: int
    weight_bytes: int
    kv_bytes: int
    parallelism: Parallelism
    splits_kv_heads: bool
    dispatch: Dispatch | None
    interleaved: bool
    group_pages: int = 0
    judges: bool = False
    notes_routes: bool = False
    refines: bool = False

    @property
    def num_ranks(self) -> int:
        """Replicas of attention, each with a scheduler, a cache and a batch of its own."""
        return self.parallelism.data

    @property
    def on_mesh(self) -> bool:
        return self.parallelism.num_devices > 1

    @property
    def spreads_tokens(self) -> bool:
        """Outside of attention, devices of the tensor axis have tokens of their own."""
        return self.parallelism.sequence > 1

    @property
    def max_num_batched_tokens(self) -> int:
        return self.token_buckets[-1]

    @property
    def kv_taint(self) -> str:
        """What tells this cache's pages from exact ones, wherever they may meet."""
        kept = jnp.dtype(self.kv_dtype)
        name = "bfloat16" if kept == jnp.uint16 else kept.name  # see `storage_dtype`
        name = "exact" if kept == storage_dtype(self.dtype, self.platform) else name
        return f"{name} calibrated" if self.kv_calibrated else name

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @property
    def num_copies(self) -> int:
        """Pages behind those that are handed out: while a token is refined, each row has one."""
        return self.max_num_seqs if self.refines else 0

    @property
    def compiler_options(self) -> dict[str, str | bool] | None:
        """What programs are compiled with beyond a compiler's defaults."""
        on_tpu = self.target.platform == "tpu"
        asynchronous = self.dispatch is not None and self.dispatch.transport.way == "ragged"
        return {**ASYNCHRONOUS} if on_tpu and asynchronous else None

    def rows(self, num_tokens: int) -> int:
        """Sequences of the program for a bucket of tokens."""
        return min(num_tokens, self.max_num_seqs)

    @cached_property
    def row_buckets(self) -> tuple[int, ...]:
        """Sequences that a sampler has a program for; one, since a row of logits is long."""
        return tuple(sorted({1, *map(self.rows, self.token_buckets)}))

    def step_tokens(self, num_rows: int) -> int:
        """Tokens of the program that is a whole step of so many sequences."""
        return min(t for t in self.token_buckets if t >= num_rows)

    @property
    def programs(self) -> tuple[tuple[str, int], ...]:
        """All programs of an engine's life, kind and size, in the order they are wanted.

        "forward" (tokens) and "sample" (sequences) make a step together; the first two serve the
        first token. "step" (sequences) is both in one, for steps that are mostly decoding, and
        "beginning" (tokens) is a "forward" for prompts alone, read from their first tokens.
        "evidence" (tokens) is what a reward head says of a step's hidden states. "refine" (tokens)
        is a whole step with rows whose tokens are refined.
        """
        first = min(self.token_buckets, key=lambda t: abs(t - FIRST_BUCKET))
        small = self.step_tokens(self.row_buckets[-1])
        wanted = [("forward", first), ("sample", self.rows(first))]
        wanted += [("seed_history", 0), ("copy_pages", 0), ("step", 1)]
        wanted += [("forward", t) for t in self.token_buckets if t > small]
        if self.spreads_tokens:
            wanted += [("beginning", t) for t in self.token_buckets if t > small]
        wanted += [(kind, r) for r in self.row_buckets for kind in ("step", "sample")]
        if self.dispatch is not None:
            wanted += [("take_load", 0), ("move_experts", 0)]
        if self.decode_steps > 1:
            wanted += [("decode", r) for r in self.row_buckets]
        if self.judges:
            wanted += [("evidence", t) for t in self.token_buckets]
        if self.refines:
            wanted += [("refine", t) for t in self.token_buckets]
        return tuple(dict.fromkeys(wanted))

    @property
    def num_programs(self) -> int:
        return len(self.programs)

    def describe(self) -> str:
        kept = "" if self.kv_taint == "exact" else f" in {self.kv_taint}"
        types = " + ".join(filter(None, [self.quantization, jnp.dtype(self.dtype).name]))
        return (
            f"{self.platform} {types} ({self.kernels} kernels), "
            f"weights {_size(self.weight_bytes)}, cache{kept} {_size(self.kv_bytes)} = "
            f"{self.num_pages} pages x {self.page_size} tokens, context {self.max_model_len}, "
            f"up to {self.max_num_seqs} sequences and {self.max_num_batched_tokens} tokens a step, "
            f"{self.num_programs} programs"
        )


def resolve(
    config: EngineConfig,
    hf: Mapping[str, Any],
    cfg: Any,
    weight_bytes: Callable[[Any, str | None], int],
    device: Any,
    *,
    kv_calibrated: bool = False,
    memory: int | None = None,
) -> Plan:
    """Decides everything.

    Args:
        hf: `config.json`.
        cfg: the family's config.
        weight_bytes: memory of a device's weights, which are not loaded yet, in an element type and
            with large ones quantised or not.
        kv_calibrated: the checkpoint brings scales for a cache in eight bits.
        memory: bytes of the device; by default it is asked.

    Raises:
        ConfigError: the model and one sequence do not fit; the message names what would.
    """
    target = Target.of(device)
    platform = target.platform
    kernels = _kernels(config, platform)
    dtype = _dtype(config, hf, platform, kernels)
    kv_dtype = _kv_dtype(config.kv_cache_dtype, dtype, platform)
    page_size = config.page_size or _page_size(config, platform)
    max_seqs = config.max_num_seqs or (64 if platform == "cpu" else 256)
    batched = config.max_num_batched_tokens or (1024 if platform == "cpu" else 2048)
    quantization = _quantization(config.quantization, hf)
    parallelism = parallelism_of(config)
    weights = weight_bytes(dtype, quantization)
    latent = cfg.kv_shape[2] == 0  # its one head is every device's
    kv_shape = (1 if latent else sizes_on_device(cfg, parallelism)["kv_heads"], *cfg.kv_shape[1:])
    kv_shape = stored_shape(kv_shape, target) if kernels == "pallas" else kv_shape
    kv_calibrated = kv_calibrated and kv_dtype == jnp.int8
    per_page = page_bytes(
        cfg.num_layers, page_size, kv_shape, kv_dtype, cfg.key_parts,
        calibrated=kv_calibrated, whole_scales=platform == "tpu",
    )  # fmt: skip
    sharing = parallelism.num_devices if platform == "cpu" else 1  # devices of one machine
    total = (memory or memory_limit(device)) // sharing - _copies(config, max_seqs) * per_page
    max_len, num_pages = _cache(
        config, cfg.max_len, page_size, per_page, max_seqs, weights, platform, total
    )
    max_seqs = min(max_seqs, num_pages)  # each has a page of its own
    return Plan(
        platform=platform,
        target=target,
        dtype=dtype,
        quantization=quantization,
        activation_dtype=jnp.dtype(jnp.float32) if platform == "cpu" else dtype,
        kv_dtype=kv_dtype,
        kv_calibrated=kv_calibrated,
        kv_shape=kv_shape,
        max_model_len=max_len,
        max_num_seqs=max_seqs,
        token_buckets=_buckets(max(min(batched, num_pages * page_size), max_seqs), _unit(config)),
        page_size=page_size,
        num_pages=num_pages,
        kernels=kernels,
        unrolled=platform == "gpu" or (kernels == "reference" and platform == "cpu"),
        decode_steps=decode_steps_of(config, parallelism),
        weight_bytes=weights,
        kv_bytes=(num_pages + _copies(config, max_seqs)) * per_page,
        parallelism=parallelism,
        splits_kv_heads=not latent,
        dispatch=dispatch_of(config, cfg, parallelism, target, quantization),
        interleaved=is_interleaved(config),
        group_pages=_group_pages(config, kernels, platform, page_size, max_len),
    )


def for_searches(plan: Plan, config: EngineConfig, cfg: Any, *, judges: bool) -> Plan:
    """The plan with what searches want to know of paths.

    Raises:
        ConfigError: routes are asked for where there are none, or on several devices.
    """
    for name in ("enable_return_routed_experts", "enable_route_noise"):
        if getattr(config, name) and (cfg.router is None or plan.on_mesh):
            none = cfg.router is None
            why = "the model has no experts" if none else "tokens are on several devices"
            raise ConfigError(f"{name}=True, and {why}; leave it out")
    return replace(
        plan, judges=judges, notes_routes=config.enable_return_routed_experts,
        refines=config.enable_route_noise,
    )  # fmt: skip


def _group_pages(
    config: EngineConfig, kernels: str, platform: str, page_size: int, max_len: int
) -> int:
    """`Plan.group_pages`."""
    alone = config.disable_cascade_attn or kernels == "reference"
    keys = 0 if alone else SHARED_KEYS.get(platform, 0)
    pages = max(1, keys // page_size)
    return pages if keys and pages * page_size < max_len else 0


def _copies(config: EngineConfig, max_seqs: int) -> int:
    """Pages that nobody is given: `Plan.num_copies`."""
    return max_seqs if config.enable_route_noise else 0


def _kernels(config: EngineConfig, platform: str) -> str:
    """The asked set of kernels; "auto": the platform's own, where it can be had."""
    native = platform == "cpu" and kernels_pallas.cpu.expected()
    own = "pallas" if platform != "cpu" else "native" if native else "reference"
    if config.kernels not in ("auto", "reference", own):
        needs = {"native": "a CPU and a C++ compiler", "pallas": "a TPU or a GPU"}
        raise ConfigError(
            f"kernels={config.kernels!r} needs {needs[config.kernels]}; here the device is "
            f"{platform}. Use kernels='auto'"
        )
    return own if config.kernels == "auto" else config.kernels


def _quantization(asked: str | None, hf: Mapping[str, Any]) -> str | None:
    """A checkpoint that was made for products of int8 is served so; float8 becomes floats."""
    if asked == "int8":
        return asked
    said = (hf.get("quantization_config") or {}).get("quant_method")
    if asked not in (None, said):
        seen = f"says quant_method {said!r}" if said else "speaks of no quantisation"
        raise ConfigError(
            f"quantization={asked!r}: a checkpoint may be stored so, but this one's config.json "
            f"{seen}. Leave it out, or use quantization='int8' to round while loading"
        )
    return "int8" if serves_int8(hf) else None


def serves_int8(hf: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was made for products of int8, in rows that are held as they are."""
    stored = scheme(hf)
    if stored is None or stored.block is not None:
        return False
    return stored.kind == "int8" and stored.rounds_activations


def _dtype(config: EngineConfig, hf: Mapping[str, Any], platform: str, kernels: str) -> Any:
    """The asked type; "auto": the checkpoint's, except where the device is bad at it."""
    if config.dtype == "float16" and kernels == "native":
        raise ConfigError(
            "dtype='float16' is none that the native CPU kernels compute with; use "
            "dtype='bfloat16' or dtype='float32', or kernels='reference'"
        )
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    own = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if platform == "cpu" and kernels == "reference":
        return jnp.dtype(jnp.float32)  # XLA:CPU widens 16-bit weights on each use
    return jnp.dtype(jnp.bfloat16) if own in ("bfloat16", "float16") else jnp.dtype(jnp.float32)


def _kv_dtype(asked: str, dtype: Any, platform: str) -> Any:
    """In which pages are stored; the kernels of a CPU alone round floats for them."""
    if asked == "bfloat16" and dtype != jnp.bfloat16 and platform != "cpu":
        raise ConfigError(
            f"kv_cache_dtype='bfloat16' with dtype {jnp.dtype(dtype).name} on a {platform}: use "
            "dtype='bfloat16' or kv_cache_dtype='auto'"
        )
    return storage_dtype(dtype if asked == "auto" else jnp.dtype(asked), platform)


def _page_size(config: EngineConfig, platform: str) -> int:
    """On a TPU the scales of a rounded page are whole registers of lanes."""
    if platform == "cpu":
        return 32
    return 128 if platform == "tpu" and config.kv_cache_dtype in ("int8", "int4") else 64


def _unit(config: EngineConfig) -> int:
    """What a step's tokens are a multiple of: devices have equal parts of it, or of each half."""
    n = config.sequence_parallel_size
    return 2 * n if n > 1 and config.enable_dbo else n


def _buckets(largest: int, unit: int) -> tuple[int, ...]:
    """Powers of two from 8 on, and the largest itself; rounded up to multiples of `unit`."""
    sizes = [8]
    while sizes[-1] * 2 < largest:
        sizes.append(sizes[-1] * 2)
    sizes = [*(s for s in sizes if s < largest), largest]
    return tuple(sorted({-(-s // unit) * unit for s in sizes}))


def _cache(
    config: EngineConfig,
    model_len: int,
    page_size: int,
    per_page: int,
    max_seqs: int,
    weights: int,
    platform: str,
    total: int,
) -> tuple[int, int]:
    """Context length and number of pages, on a device with `total` bytes."""
    asked = config.max_model_len or model_len
    if asked > model_len:
        raise ConfigError(
            f"max_model_len={asked} is beyond the {model_len} positions that the model knows"
        )
    most = (total - weights) // per_page
    if most < 1:
        narrower = "" if config.quantization == "int8" else "quantization='int8', "
        raise ConfigError(
            f"weights take {_size(weights)} and a page of the cache {_size(per_page)}, but the "
            f"device has {_size(total)}; choose {narrower}a narrower dtype or a smaller model"
        )
    if config.num_pages is not None:
        pages = config.num_pages
        if pages > most:
            raise ConfigError(
                f"num_pages={pages} take {_size(pages * per_page)}, but {_size(total)} hold "
                f"weights of {_size(weights)} too; the nearest setting that works is "
                f"num_pages={most}"
            )
    else:
        room = int(config.memory_utilization * total) - weights
        if platform == "cpu":  # shared with everything else: no more than is of use
            room = min(room, max(_GIB, 2 * per_page * -(-min(asked, 8192) // page_size)))
        pages = min(room // per_page, max_seqs * -(-asked // page_size))
        if pages < 1:
            least = math.ceil(1000 * (weights + per_page + 1) / total) / 1000
            raise ConfigError(
                f"weights take {_size(weights)}, and memory_utilization="
                f"{config.memory_utilization} of {_size(total)} leaves no page of "
                f"{_size(per_page)}; the nearest setting that works is memory_utilization="
                f"{min(least, 1.0)}"
            )
    fits = pages * page_size
    if config.max_model_len is not None and asked > fits:
        raise ConfigError(
            f"max_model_len={asked} needs {-(-asked // page_size)} pages of {page_size} tokens, "
            f"but there is room for {pages}; the nearest setting that works is "
            f"max_model_len={fits}"
        )
    return min(asked, fits), pages


def memory_limit(device: Any) -> int:
    """Bytes that the device can give: its own limit, or on CPU what is available now."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _size(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB else f"{nbytes / (1 << 20):.1f} MiB"


def default_device() -> Any:
    """The first device of JAX.

    Raises:
        ConfigError: there is none of the platform that was asked for.
    """
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        raise no_device(error) from error


def no_device(error: Exception) -> ConfigError:
    """What to say where JAX could not begin; a plugin without its card fails without a word."""
    why = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "its backend did not start"
    asked = jax.config.values["jax_platforms"]
    remedy = "; unset it or use cpu" if asked else "; set JAX_PLATFORMS=cpu"
    return ConfigError(f"JAX_PLATFORMS={asked or ''!r}: {why}{remedy}")
