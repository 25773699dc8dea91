"""What libtpu makes of TPU kernels: `python -m benchmarks.tpu_loops v6e --ops flash_attention`.

Nothing runs and no clock is read. Every shipped case is compiled for a TPU that is not there, and
beside it kernels that come with JAX on the same shapes, where it has some. A line for each kernel
says what the compiler wrote of it: bundles of instructions by loop and by branch, registers stored
for lack of room, what that added to the bundles, and `chains`.

A bundle is a cycle unless it waits. What a bundle waits for is in the chains: cycles from the first
instruction of a stretch to the last, by the latencies that the compiler believes in. So a pass of a
loop takes at least the larger of the two, and memory may take longer still. It compares two forms
of a loop before a TPU can, and predicts no time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.compiled import TARGETS, abstract, shipped
from benchmarks.kernels import versions
from benchmarks.programs import runner
from benchmarks.records import machine
from kernels_pallas.op import Case
from sharding import compile_only, kernel_report

_SPLASH = ((128, 128, 128), (512, 512, 512), (1024, 1024, 512))
"""Queries, keys, and keys that are computed at a time. The first is splash attention's default."""
_RAGGED = ((512, 32), (1024, 32), (512, 64))
"""Keys and tokens in a block of ragged paged attention; its table has such for a v6e."""


@dataclass(frozen=True)
class Entrant:
    """Ours, or somebody else's way to compute a case.

    Attributes:
        tile: of it; () for its own choice.
        run: what is compiled, of `inputs`.
    """

    name: str
    tile: tuple[int, ...]
    run: Callable[..., Any]
    inputs: Any


def rivals(op: str, case: Case) -> Iterator[Entrant]:
    """Kernels of JAX that compute a shipped case, or as much of it."""
    args, arrays = abstract(case)
    if op.startswith("flash_attention"):
        for tile in _SPLASH:
            run = _splash(args, case.options.get("window", 0), tile, op.endswith("gradient"))
            yield Entrant("splash_attention", tile, run, args[:4])
    more = "window" in arrays or case.options.get("mass")
    if op == "page_attention" and isinstance(args[1], jax.ShapeDtypeStruct) and not more:
        for tile in _RAGGED if args[2] is not None else ():  # it knows no latents
            yield Entrant("ragged_paged_attention", tile, *_ragged(args, case, tile))


def _splash(args: Any, window: int, tile: tuple[int, int, int], backward: bool) -> Any:
    """Causal, of packed documents. The gradient is that of a sum: its kernels are the same."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, N, T, _ = args[0].shape
    queries, keys, inner = tile
    causal = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    attend = splash.make_splash_mha(
        masks.MultiHeadMask([causal] * N), head_shards=1, q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            queries, keys, inner, block_q_dkv=queries, block_kv_dkv=keys,
            block_kv_dkv_compute=inner, block_q_dq=queries, block_kv_dq=keys,
        ),
    )  # fmt: skip

    def run(q: Array, k: Array, v: Array, segments: Array) -> Any:
        ids = splash.SegmentIds(segments[0], segments[0])

        def forward(q: Array, k: Array, v: Array) -> Array:
            return attend(q[0], k[0], v[0], segment_ids=ids)

        if not backward:
            return forward(q, k, v)
        total = lambda *x: forward(*x).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(total, (0, 1, 2))(q, k, v)

    return run


def _ragged(args: Any, case: Case, tile: tuple[int, int]) -> tuple[Any, Any]:
    """Keys and values of a page lie together there, by head."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    q, pages, _, _, step = args
    _, P, K, Z, H = pages.shape
    shapes = [(q.shape, q.dtype), ((P, Z, 2 * K, H), pages.dtype)]
    numbers = [step.kv_lens.shape, step.tables.shape, step.row_starts.shape, (1,)]
    inputs = [jax.ShapeDtypeStruct(*x) for x in (*shapes, *((n, jnp.int32) for n in numbers))]

    def run(*args: Array) -> Array:
        return ragged_paged_attention(
            *args, sm_scale=case.options["scale"], num_kv_pages_per_block=tile[0] // Z,
            num_queries_per_block=min(tile[1], q.shape[0]), vmem_limit_bytes=64 * 2**20,
        )  # fmt: skip

    return run, inputs


def report(entrant: Entrant, target: str) -> list[kernel_report.Kernel]:
    """The kernels of an entrant, compiled for a target."""
    sharding = NamedSharding(compile_only.mesh(TARGETS[target]), PartitionSpec())
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), entrant.inputs
    )
    with jax.sharding.set_mesh(sharding.mesh):  # some kernels ask which TPU it is
        lowered = jax.jit(entrant.run).lower(*inputs)
    return kernel_report.compile_with_report(lowered)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="+", choices=[name for name in TARGETS if name != "h200"])
    parser.add_argument("--ops", nargs="*", default=[])
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--alone", action="store_true", help="without kernels of JAX")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    here = {key: machine()[key] for key in ("commit", "date")}
    print(json.dumps(versions() | here), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kernel_report.prepare(Path(folder))
        for target in args.targets:
            for op, name, case in shipped(target, args.ops, args.cases):
                run = runner(op, case, name, op.bodies[name].wanted(target))
                ours = Entrant("jaxserve", (), run, [abstract(case)])
                for entrant in (ours, *(() if args.alone else rivals(op.name, case))):
                    about = {"target": target, "op": op.name, "case": case.name}
                    about |= {"of": entrant.name, "tile": entrant.tile}
                    for kernel in report(entrant, target):
                        print(json.dumps(about | asdict(kernel)), flush=True)


if __name__ == "__main__":
    main()
