"""Hardware as a mesh, in one run: `python -m benchmarks.parallel [--only plan ...] [--out FILE]`.

    plan      the cost model beside what is published of CloudMatrix384 (docs/cloudmatrix.md)
    dispatch  every way to send tokens to experts on ten CPU devices (EP10, a 32nd of EP320): that
              none is lost and the sums are right, and what goes over the wire against its formula
    engine    the engine on eight CPU devices, by split: the tokens of one device, and steps
    compiled  decoding steps of published models for TPU slices that are not there: memory,
              collectives, and what is computed under them, with microbatches and without

Nothing here is a time but those of compilers: CPU devices tell what is sent, not how long it takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 10)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, PartitionSpec  # noqa: E402

from benchmarks import cloudmatrix, records  # noqa: E402
from jaxserve import LLM, SamplingParams  # noqa: E402
from jaxserve.deployment import shapes  # noqa: E402
from jaxserve.deployment.compiled import Step, compile_step  # noqa: E402
from jaxserve.testing import write_checkpoint  # noqa: E402
from moe import wire  # noqa: E402
from moe.dispatch import Dispatch  # noqa: E402
from moe.experts import Experts, experts, experts_on_rows  # noqa: E402
from moe.parallel import FarExperts, PlacedExperts  # noqa: E402
from moe.placement import ExpertLayout  # noqa: E402
from moe.transport import Transport  # noqa: E402
from sharding import hlo  # noqa: E402
from sharding.hardware import named  # noqa: E402
from sharding.mesh import Parallelism  # noqa: E402

SLICES = (  # model, slice, split, sequences of a device, their context
    ("deepseek-r1", "v5p:4x4x20", Parallelism(data=320, expert=320), 96, 4352),
    ("qwen3-235b-a22b", "v5e:16x16", Parallelism(data=256, expert=256), 4, 4352),
    ("qwen3-235b-a22b", "v6e:16x16", Parallelism(data=256, expert=256), 16, 4352),
    ("qwen3-30b-a3b", "v6e:8x8", Parallelism(data=64, expert=64), 64, 4352),
)
ENGINE = (
    ("qwen3", {"tensor_parallel_size": 2}),
    ("qwen3", {"tensor_parallel_size": 4, "data_parallel_size": 2}),
    ("qwen3_moe", {"expert_parallel_size": 8}),
    ("qwen3_moe", {"expert_parallel_size": 4, "tensor_parallel_size": 2}),
    ("deepseek_v3", {"expert_parallel_size": 4, "enable_dbo": True}),
)


def main() -> None:
    parts = {"plan": plan, "dispatch": dispatches, "engine": engine, "compiled": compiled}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    args = parser.parse_args()
    about = records.machine() | {"jax": jax.__version__}
    for part in args.only:
        for line in parts[part]():
            line = {"part": part, **line, **about}
            print(json.dumps(line), flush=True)
            if args.out:
                records.write(line, args.out)


def plan() -> Iterator[dict[str, Any]]:
    """Published rows, and how far off the model is."""
    for row in cloudmatrix.rows():
        yield {
            "row": row.name, "section": row.section, "unit": row.unit, "published": row.published,
            "model": round(row.model, 3), "off": round(row.off, 4),
        }  # fmt: skip


def dispatches() -> Iterator[dict[str, Any]]:
    """EP10 = 8 experts + 1 more copy + 1 shared expert, as EP320 has 256 + 32 + 32 replicas."""
    layout = ExpertLayout(8, 10, 1, shared_block=10)
    mesh = Mesh(np.array(jax.devices()[:10]), ("expert",))
    rng = np.random.default_rng(0)
    tokens, width, top = 16, 256, 4
    x = rng.standard_normal((10 * tokens, width)).astype(np.float32)
    ids = np.argsort(rng.random((10 * tokens, 8)), 1)[:, :top].astype(np.int32)
    weights = rng.random((10 * tokens, top)).astype(np.float32)
    logical = [rng.standard_normal((9, *s)).astype(np.float32) / 8
               for s in ((64, width), (64, width), (width, 64))]  # fmt: skip
    placement = layout.initial()
    slots = Experts(*(w[placement.expert_of] for w in logical))
    shared = np.full((len(ids), 1), 8, np.int32)
    want = experts(
        jnp.asarray(x), jnp.concatenate([ids, shared], 1),
        jnp.concatenate([weights, np.ones_like(weights[:, :1])], 1),
        Experts(*map(jnp.asarray, logical)), activation="silu",
    )  # fmt: skip
    for way in ("padded", "ragged"):
        for early in (False, True):
            d = Dispatch(layout, Transport(("expert",), way), early_int8=early)
            yield _dispatched(d, mesh, (x, ids, weights), PlacedExperts(slots, placement), want)


def _dispatched(d: Dispatch, mesh: Mesh, tokens: Any, placed: Any, want: Any) -> dict[str, Any]:
    rows, whole = PartitionSpec("expert"), PartitionSpec()
    specs = (rows, rows, rows, PlacedExperts(rows, whole))
    run = partial(FarExperts(d, experts_on_rows), activation="silu")
    function = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    step = jax.jit(function).lower(*tokens, placed).compile()
    found = step(*tokens, placed)
    sent = [c for c in hlo.collectives_of(step.as_text()) if c.dtype != "s32"]
    width, T, A = tokens[0].shape[1], tokens[0].shape[0] // 10, tokens[1].shape[1] + 1
    return {
        "way": d.transport.way, "early_int8": d.early_int8, "devices": d.layout.num_devices,
        "largest_error": float(jnp.abs(found - want).max() / jnp.abs(want).max()),
        "sent_dtypes": sorted({c.dtype for c in sent}),
        "collectives": [c._asdict() for c in sent],
        "row_bytes": wire.row_bytes(width) if d.early_int8 else 4 * width,
        "payload_bytes_per_device": T * A * (wire.row_bytes(width) if d.early_int8 else 4 * width),
    }  # fmt: skip


def engine() -> Iterator[dict[str, Any]]:
    """Tiny models; what is said must be what one device says."""
    settings: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 16,
        "page_size": 8, "background_compile": False, "progress": False,
    }  # fmt: skip
    rng = np.random.default_rng(1)
    prompts = [{"prompt_token_ids": rng.integers(5, 300, n).tolist()} for n in range(2, 40, 3)]
    params = SamplingParams(temperature=0, max_tokens=24)
    with tempfile.TemporaryDirectory() as folder:
        alone: dict[str, Any] = {}
        for model_type, split in ENGINE:
            path = Path(folder) / model_type
            if not path.exists():
                write_checkpoint(path, model_type)
                alone[model_type] = _said(path, settings, prompts, params)
            tokens, stats, devices = _said(path, settings | split, prompts, params)
            yield {
                "model": model_type, "split": split, "devices": devices,
                "tokens_equal": tokens == alone[model_type][0], "steps": stats.num_steps,
                "steps_alone": alone[model_type][1].num_steps,
                "compiles_after_warmup": stats.compiles_after_warmup,
            }  # fmt: skip


def _said(path: Path, settings: dict[str, Any], prompts: Any, params: Any) -> tuple[Any, Any, int]:
    with LLM(path, **settings) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        return tokens, llm.stats(), llm.plan.parallelism.num_devices


def compiled() -> Iterator[dict[str, Any]]:
    """With microbatches, and without."""
    for model, target, split, sequences, context in SLICES:
        for microbatch in (True, False):
            step = Step(sequences, context, microbatch=microbatch)
            found = compile_step(shapes.read(model), named(target), split, step).as_dict()
            yield {"model": model, **found, "step": dataclasses.asdict(step)}


if __name__ == "__main__":
    main()
