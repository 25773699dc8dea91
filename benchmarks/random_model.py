"""A model of a published shape with random weights, made on the device: nothing is downloaded.

    python -m benchmarks.random_model 8b --library jaxserve --out 8b-jaxserve.json
    python -m benchmarks.random_model 8b --library torch --out 8b-torch.json

The engine is driven without text, so that it needs no tokenizer. torch is transformers with static
batches, which is what its users run; it has an edge here, because all rows are equally long.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.records import machine

_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "head_dim": 128,
    "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_MOE = _QWEN3 | {
    "model_type": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
_TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "8b": _QWEN3
    | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "30b-a3b": _MOE
    | {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "tiny": _QWEN3 | _TINY,
    "tiny-moe": _MOE | _TINY | {
        "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip
"""config.json of Qwen3-8B and Qwen3-30B-A3B, and two to try the program out."""


@dataclass(frozen=True)
class Workload:
    """So many prompts at once, of so many tokens, each continued by so many."""

    name: str
    prompts: int
    tokens: int
    out: int

    def draw(self, vocab: int, seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return rng.integers(8, vocab, (self.prompts, self.tokens)).tolist()


WORKLOADS = (  # the ones that say most come first
    Workload("decode-1", 1, 32, 64),
    Workload("prefill-1x2048", 1, 2048, 1),
    Workload("decode-32", 32, 128, 64),
    Workload("prefill-8x1024", 8, 1024, 1),
)
_SMOKE = (Workload("decode-2", 2, 16, 4), Workload("prefill-1x64", 1, 64, 1))

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and how many tokens to add -> the tokens added."""

Say = Callable[..., None]
"""Writes down what is known so far, by name: time may end before the first workload does."""


def random_params(declared: Any, sizes: Any, dtype: Any) -> Any:
    """Values for a declared tree, drawn on the device. One program for each shape: layers that are
    written out behind one another have hundreds of leaves, and no more shapes than one layer."""
    from sharding.tree import is_weight

    leaves, tree = jax.tree.flatten(declared, is_leaf=is_weight)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        _drawn(
            key, w.shape(sizes), jnp.dtype(w.dtype or dtype), w.init,
            stacked=len(w.layers) > 0 and len(w.shape(sizes)) > 1,
        )
        for w, key in zip(leaves, keys, strict=True)
    ]  # fmt: skip
    return jax.tree.unflatten(tree, drawn)


@partial(jax.jit, static_argnums=(1, 2, 3), static_argnames="stacked")
def _drawn(key: Any, shape: tuple[int, ...], dtype: Any, init: str, *, stacked: bool) -> jax.Array:
    """A leaf, one layer of a stack at a time: random bits take twice the room of bfloat16."""
    if init != "normal":
        return jnp.full(shape, float(init == "ones"), dtype)
    if not stacked:
        return _normal(key, shape=shape, dtype=dtype)
    make = partial(_normal, shape=shape[1:], dtype=dtype)
    return jax.lax.map(make, jax.random.split(key, shape[0]))


def _normal(key: Any, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)


def engine(raw: dict[str, Any], say: Say, **settings: Any) -> Generate:
    """jaxserve's engine over random weights, without text."""
    from jaxserve import plan as planning
    from jaxserve.config import EngineConfig
    from jaxserve.engine.runner import Runner
    from jaxserve.models.family import family
    from jaxserve.quant import weights
    from sharding.tree import unstack

    module = family(raw["model_type"])
    cfg = module.config(raw)
    device = planning.default_device()
    size = partial(weights.weight_bytes, module, cfg)
    plan = planning.resolve(EngineConfig(**settings), raw, cfg, size, device)
    most = plan.max_num_batched_tokens  # two programs of each kind are enough for this
    plan = dataclasses.replace(plan, token_buckets=tuple(sorted({min(32, most), most})))
    say(plan=plan.describe(), programs=wanted(plan))
    declared, began = module.declare_params(cfg), time.monotonic()
    tree = unstack(declared) if plan.unrolled else declared
    runner = Runner(plan, module, cfg, random_params(tree, cfg.sizes, plan.dtype), device)
    jax.block_until_ready(runner.params)
    say(weights_s=round(time.monotonic() - began, 1))
    began, took = time.monotonic(), dict[str, float]()

    def on_program(kind: str, size: int, seconds: float) -> None:
        took[f"{kind} {size}"] = round(seconds, 1)
        say(compiled_s=took)

    runner.warm_up(background=False, on_program=on_program, programs=wanted(plan))
    say(compile_s=round(time.monotonic() - began, 1))
    return _served(runner)


def wanted(plan: Any) -> list[tuple[str, int]]:
    """Programs of the plan but for those whose work others do as well here: passes without a
    sampler that only serve until whole steps exist, and the sampler of one row behind a prompt."""
    whole, rows = plan.step_tokens(plan.row_buckets[-1]), plan.row_buckets[-1]
    least = {"forward": whole + 1, "sample": rows}
    return [(kind, n) for kind, n in plan.programs if n >= least.get(kind, 0)]


def _served(runner: Any) -> Generate:
    from jaxserve.cache.page_manager import root_key
    from jaxserve.engine.engine import Engine
    from jaxserve.engine.generation import Generation
    from jaxserve.engine.sequence import Sequence
    from jaxserve.request import RequestMetrics, SamplingParams

    served, root = Engine(runner, prefix_caching=False), root_key("random")

    def generate(prompts: list[list[int]], out: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        sequences = list[Sequence]()
        for i, ids in enumerate(prompts):
            metrics = RequestMetrics(arrival_time=time.monotonic())
            handle = Generation(f"request-{i}", ids, 1, metrics, served.abort)
            sequences.append(
                Sequence(
                    list(ids), len(ids), params, handle, root, seed=(0, i), max_len=len(ids) + out
                )
            )
            served.add([sequences[-1]])
        while served.has_work:
            served.step()
        return [s.tokens[s.prompt_len :] for s in sequences]

    return generate


def torch_model(raw: dict[str, Any], say: Say, **_: Any) -> Generate:
    """transformers over random weights."""
    import torch
    import transformers

    where = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    say(device=where, versions=versions)
    began = time.monotonic()
    fields = {k: v for k, v in raw.items() if k not in ("model_type", "torch_dtype")}
    config = transformers.AutoConfig.for_model(raw["model_type"], **fields)
    with torch.device(where):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    say(weights_s=round(time.monotonic() - began, 1))

    @torch.inference_mode()
    def generate(prompts: list[list[int]], out: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=where)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=out, max_new_tokens=out,
        )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()

    return generate


def measure(
    generate: Generate, workload: Workload, vocab: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Seconds of each round after one that warms up, and tokens of the median one: after each."""
    seconds = list[float]()
    counted = workload.tokens if workload.out == 1 else workload.out
    for seed in range(rounds + 1):
        began = time.perf_counter()
        found = generate(workload.draw(vocab, seed), workload.out)
        took = time.perf_counter() - began
        if {len(tokens) for tokens in found} != {workload.out}:
            raise RuntimeError(f"{workload}: outputs of {sorted({len(t) for t in found})} tokens")
        if not seed:
            continue
        seconds.append(round(took, 4))
        rate = workload.prompts * counted / statistics.median(seconds)
        yield {
            **dataclasses.asdict(workload), "seconds": list(seconds),
            "tokens_per_second": round(rate, 1),
            "counted": "prompt" if workload.out == 1 else "output",
        }  # fmt: skip


LIBRARIES = {"jaxserve": engine, "torch": torch_model}


def run(shape: str, library: str, out: Path, rounds: int = 3, **settings: Any) -> dict[str, Any]:
    """Measures every workload and returns what is written to `out`, as it goes."""
    smoke, raw, began = shape.startswith("tiny"), SHAPES[shape], time.monotonic()
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128}
    if not smoke:
        limits = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "max_model_len": 4096}
    report: dict[str, Any] = {"name": f"random-{shape}", "library": library, "host": machine()}

    def say(**more: Any) -> None:
        report.update(more, seconds=round(time.monotonic() - began, 1))
        part = out.with_suffix(".part")  # whoever is ended while it writes leaves a whole file
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(out)

    say(jax=jax.__version__, workloads=[])
    generate, done = LIBRARIES[library](raw, say, **limits | settings), list[dict[str, Any]]()
    for workload in _SMOKE if smoke else WORKLOADS:
        found: dict[str, Any] = {}
        for found in measure(generate, workload, raw["vocab_size"], rounds):
            say(workloads=[*done, found])
        done.append(found)
        print(json.dumps(found), flush=True)
    gc.collect()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--library", choices=list(LIBRARIES), default="jaxserve")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization", choices=["int8"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    more = {"quantization": args.quantization} if args.quantization else {}
    run(args.shape, args.library, args.out, args.rounds, **more)


if __name__ == "__main__":
    main()
