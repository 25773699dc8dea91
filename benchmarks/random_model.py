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
from collections.abc import Callable
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


WORKLOADS = (
    Workload("decode-1", 1, 32, 64),
    Workload("decode-32", 32, 128, 64),
    Workload("prefill-1x2048", 1, 2048, 1),
    Workload("prefill-8x1024", 8, 1024, 1),
)
_SMOKE = (Workload("decode-2", 2, 16, 4), Workload("prefill-1x64", 1, 64, 1))

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and how many tokens to add -> the tokens added."""


def random_params(declared: Any, sizes: Any, dtype: Any) -> Any:
    """Values for a declared tree, drawn on the device, one layer of a leaf at a time."""
    from sharding.tree import is_weight

    def draw(w: Any, key: Any) -> jax.Array:
        shape, kind = w.shape(sizes), jnp.dtype(w.dtype or dtype)
        if w.init != "normal":
            return jnp.full(shape, float(w.init == "ones"), kind)
        one = shape[1:] if len(w.layers) > 0 and len(shape) > 1 else shape
        make = partial(_normal, shape=one, dtype=kind)
        return make(key) if one is shape else jax.lax.map(make, jax.random.split(key, shape[0]))

    leaves, tree = jax.tree.flatten(declared, is_leaf=is_weight)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        tree, [jax.jit(partial(draw, w))(key) for w, key in zip(leaves, keys, strict=True)]
    )


def _normal(key: Any, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)


def engine(raw: dict[str, Any], **settings: Any) -> tuple[Generate, dict[str, Any]]:
    """jaxserve's engine over random weights, without text; and what it has decided."""
    from jaxserve import plan as planning
    from jaxserve.cache.page_manager import root_key
    from jaxserve.config import EngineConfig
    from jaxserve.engine.engine import Engine
    from jaxserve.engine.generation import Generation
    from jaxserve.engine.runner import Runner
    from jaxserve.engine.sequence import Sequence
    from jaxserve.models.family import family
    from jaxserve.quant import weights
    from jaxserve.request import RequestMetrics, SamplingParams
    from sharding.tree import unstack

    module = family(raw["model_type"])
    cfg = module.config(raw)
    device = planning.default_device()
    size = partial(weights.weight_bytes, module, cfg)
    plan = planning.resolve(EngineConfig(**settings), raw, cfg, size, device)
    most = plan.max_num_batched_tokens  # two programs of each kind are enough for this
    plan = dataclasses.replace(plan, token_buckets=tuple(sorted({min(32, most), most})))
    declared = module.declare_params(cfg)
    began = time.monotonic()
    tree = unstack(declared) if plan.unrolled else declared
    runner = Runner(plan, module, cfg, random_params(tree, cfg.sizes, plan.dtype), device)
    jax.block_until_ready(runner.params)
    made = time.monotonic() - began
    runner.warm_up(background=False, on_program=lambda *_: None)
    about = {
        "plan": plan.describe(), "weights_s": round(made, 1),
        "compile_s": round(time.monotonic() - began - made, 1),
    }  # fmt: skip
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

    return generate, about


def torch_model(raw: dict[str, Any], **_: Any) -> tuple[Generate, dict[str, Any]]:
    """transformers over random weights."""
    import torch
    import transformers

    where = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {k: v for k, v in raw.items() if k not in ("model_type", "torch_dtype")}
    config = transformers.AutoConfig.for_model(raw["model_type"], **fields)
    with torch.device(where):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], out: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=where)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=out, max_new_tokens=out,
        )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return generate, {"device": where, "versions": versions}


def measure(generate: Generate, workload: Workload, vocab: int, rounds: int) -> dict[str, Any]:
    """Seconds of each round after one that warms up, and tokens of the median one."""
    seconds = []
    for seed in range(rounds + 1):
        began = time.perf_counter()
        found = generate(workload.draw(vocab, seed), workload.out)
        seconds.append(time.perf_counter() - began)
        if {len(tokens) for tokens in found} != {workload.out}:
            raise RuntimeError(f"{workload}: outputs of {sorted({len(t) for t in found})} tokens")
    middle = statistics.median(seconds[1:])
    counted = workload.tokens if workload.out == 1 else workload.out
    return {
        **dataclasses.asdict(workload), "seconds": [round(s, 4) for s in seconds[1:]],
        "tokens_per_second": round(workload.prompts * counted / middle, 1),
        "counted": "prompt" if workload.out == 1 else "output",
    }  # fmt: skip


LIBRARIES = {"jaxserve": engine, "torch": torch_model}


def run(shape: str, library: str, out: Path, rounds: int = 3, **settings: Any) -> dict[str, Any]:
    """Measures every workload and returns what is written to `out`, after each of them."""
    smoke, raw = shape.startswith("tiny"), SHAPES[shape]
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128}
    if not smoke:
        limits = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "max_model_len": 4096}
    generate, about = LIBRARIES[library](raw, **limits | settings)
    report = {"name": f"random-{shape}", "library": library, **about, "host": machine()}
    report |= {"jax": jax.__version__, "workloads": list[dict[str, Any]]()}
    for workload in _SMOKE if smoke else WORKLOADS:
        report["workloads"].append(measure(generate, workload, raw["vocab_size"], rounds))
        print(json.dumps(report["workloads"][-1]), flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
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
