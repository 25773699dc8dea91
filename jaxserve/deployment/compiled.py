"""The real decoding step of a deployment, compiled for TPUs that are not there, and what it says.

Nothing runs and no weight exists: the engine's own program is given shapes. What the compiler
reports is what it would do on the hardware (memory, collectives, what lies under each of them); how
fast that would be it does not say, and neither does this.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve import plan as planning
from jaxserve import split
from jaxserve.config import EngineConfig
from jaxserve.deployment.shapes import Shape
from jaxserve.engine.signature import program
from jaxserve.engine.spread import spread
from jaxserve.errors import ConfigError
from jaxserve.models.parallel import place_of, placed, whole_sizes
from jaxserve.quant.weights import is_large, weight_bytes
from kernels_pallas.weight import Int8Weight
from moe import wire
from moe.transport import capacity
from sharding import compile_only, flops, hlo
from sharding.mesh import Parallelism
from sharding.mesh import mesh as make_mesh
from sharding.topology import Topology
from sharding.tree import Weight, is_weight


@dataclass(frozen=True)
class Step:
    """What is compiled: a step in which every sequence decodes.

    Attributes:
        sequences: of each rank.
        context: tokens that a sequence may have.
        quantization: as of `EngineConfig`.
        microbatch: two halves of the sequences take turns.
    """

    sequences: int
    context: int
    quantization: str | None = "int8"
    microbatch: bool = True


@dataclass(frozen=True)
class Compiled:
    """A compiled step and where it came from."""

    shape: Shape
    topology: Topology
    parallelism: Parallelism
    step: Step
    plan: planning.Plan
    program: Any
    seconds: float

    @cached_property
    def text(self) -> str:
        return self.program.as_text()

    @property
    def bytes_per_device(self) -> int:
        """Arguments, temporaries and code; results that take the place of arguments once."""
        m = self.program.memory_analysis()
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return held + m.temp_size_in_bytes + m.generated_code_size_in_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `jaxserve plan --compile --json`."""
        room = self.topology.chip.memory_bytes or 0
        work = flops.by_window(self.text, self._kernel_flops())
        return {
            "target": self.topology.name,
            "devices": self.parallelism.num_devices,
            "parallelism": asdict(self.parallelism),
            "sequences_per_device": self.step.sequences,
            "context": self.step.context,
            "microbatches": 2 if self.step.microbatch else 1,
            "fits": self.bytes_per_device <= room,
            "bytes_per_device": self.bytes_per_device,
            "bytes_available": room,
            "weight_bytes": self.plan.weight_bytes,
            "kv_bytes": self.plan.kv_bytes,
            "temporary_bytes": self.program.memory_analysis().temp_size_in_bytes,
            "collectives": self.collectives(),
            "predicted_collectives": self.predicted(),
            "overlapped_flops_share": round(work.share, 4),
            "flops_per_device": work.total,
            "compile_seconds": round(self.seconds, 1),
        }

    def collectives(self) -> list[dict[str, Any]]:
        """Those of a whole step, alike ones together; a loop's as often as it runs."""
        times = Counter[hlo.Collective]()
        for collective, count in hlo.executed_collectives(self.text):
            times[collective] += count
        return [
            {**collective._asdict(), "count": count} for collective, count in sorted(times.items())
        ]

    def predicted(self) -> list[dict[str, Any]]:
        """Rows to experts and back, by the formula of the specification's section 3."""
        d, cfg = self.plan.dispatch, self.shape.cfg
        if d is None:
            return []
        halves = 2 if self.step.microbatch else 1
        tokens = -(-self.step_tokens // halves)
        rows, arriving = tokens * cfg.router.top_k, d.max_rows(tokens, cfg.router.top_k)
        kind = "ragged-all-to-all"
        if d.transport.way == "padded":  # rounds of equal parts for every device; one is counted
            n, kind = d.layout.num_devices, "all-to-all"
            rows = arriving = n * capacity(d.transport, rows, arriving // n, n)
        count = halves * sum(cfg.moe_layers)
        item = jnp.dtype(self.plan.activation_dtype).itemsize
        out = ("s8", wire.row_bytes(cfg.embed)) if d.early_int8 else ("bf16", cfg.embed * item)
        back = ("bf16", cfg.embed * 2)
        return [
            {"kind": kind, "dtype": dtype, "num_bytes": n * size, "count": count}
            for n, (dtype, size) in ((rows, out), (arriving, back))
        ]

    @property
    def step_tokens(self) -> int:
        return self.plan.step_tokens(self.step.sequences)

    def _kernel_flops(self) -> Mapping[str, float]:
        """Of one call of each kernel, as far as they follow from what a step really does.

        A kernel of ours is opaque to the compiler, and rows of its operands are mostly places for
        the worst case.
        """
        cfg, halves = self.shape.cfg, 2 if self.step.microbatch else 1
        tokens = self.step_tokens / halves
        lanes = sum(cfg.key_parts) + (cfg.key_parts[0] if self.shape.latent else cfg.head_dim)
        heads = cfg.heads // self.parallelism.tensor
        known = {"page_attention": 2.0 * tokens * heads * lanes * self.step.context}
        if cfg.router is not None:
            rows = tokens * cfg.router.top_k  # as many arrive as leave
            known["grouped_matmul"] = 2.0 * rows * cfg.embed * cfg.expert_mlp
        return known


def compile_step(
    shape: Shape, topology: Topology, parallelism: Parallelism, step: Step
) -> Compiled:
    """Compiles a decoding step of `shape` over a TPU slice.

    Raises:
        ConfigError: the slice has no compiler, too few devices, or no room for the step.
        AbsentCompilerError: the extra `aot` is not installed.
    """
    if not topology.target:
        raise ConfigError(
            f"--compile {topology.name}: there is no compiler for it; take a TPU slice, such as "
            "v5p:4x4x20"
        )
    try:
        mesh = make_mesh(parallelism, topology, compile_only.devices(topology.target))
    except ValueError as error:
        raise ConfigError(f"--compile {topology.name}: {error}") from None
    device = _Absent(mesh.devices.flat[0], topology)
    plan = _resolve(shape, parallelism, step, device)
    params = _params(shape, plan, mesh)
    made = program(plan, shape.family, shape.cfg, params, "step", step.sequences)
    made = spread(made, plan, mesh)
    started = time.monotonic()
    lowered = jax.jit(made.function, donate_argnums=made.donated).lower(*made.arguments)
    compiled = _compiled(lowered, topology, plan.compiler_options)
    seconds = time.monotonic() - started
    return Compiled(shape, topology, parallelism, step, plan, compiled, seconds)


def _compiled(lowered: Any, topology: Topology, options: Any = None) -> Any:
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"--compile {topology.name}: the step does not fit a device. Its compiler says: "
            f"{str(error).partition(': ')[2].splitlines()[0]} Lower --batch or the lengths, or "
            "take more devices"
        ) from None


class _Absent:
    """A compile-only device, with the memory that its compiler grants."""

    def __init__(self, device: Any, topology: Topology):
        self.platform, self.device_kind = device.platform, device.device_kind
        self._bytes = topology.chip.memory_bytes or 0

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self._bytes}


def _resolve(shape: Shape, parallelism: Parallelism, step: Step, device: Any) -> planning.Plan:
    cfg = shape.cfg
    page = 64
    config = EngineConfig(
        tensor_parallel_size=parallelism.tensor,
        expert_parallel_size=parallelism.expert,
        data_parallel_size=parallelism.data,
        enable_dbo=step.microbatch and parallelism.expert > 1,
        dtype="bfloat16",
        quantization=step.quantization,  # type: ignore[arg-type]
        max_model_len=step.context,
        max_num_seqs=step.sequences,
        max_num_batched_tokens=step.sequences,
        page_size=page,
        num_pages=step.sequences * -(-step.context // page),
    )
    sizes = split.sizes_on_device(cfg, parallelism)
    size = partial(weight_bytes, shape.family, cfg, sizes=sizes)
    return planning.resolve(config, shape.hf, cfg, size, device)


def _params(shape: Shape, plan: planning.Plan, mesh: Mesh) -> Any:
    """Shapes of all weights with their places."""
    cfg = shape.cfg
    sizes = whole_sizes(cfg.sizes, plan.parallelism)
    slots = plan.dispatch.layout.num_slots if plan.dispatch else sizes["experts"]

    def array(dims: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        own = PartitionSpec(*spec[: len(dims)])
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, own))

    def leaf(w: Weight) -> Any:
        spec = place_of(w, cfg.sizes, plan.parallelism)
        dims = w.shape({**sizes, "experts": slots})
        if plan.quantization and is_large(w):
            return Int8Weight(array(dims, jnp.int8, spec), array(dims[:-1], jnp.float32, spec))
        return array(dims, w.dtype or plan.dtype, spec)

    params = jax.tree.map(leaf, shape.family.declare_params(cfg), is_leaf=is_weight)
    if plan.dispatch is None:
        return params
    placement = plan.dispatch.layout.initial(cfg.num_layers)
    return placed(params, placement, lambda a: array(np.shape(a), np.int32, PartitionSpec()))
