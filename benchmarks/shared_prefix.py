"""What reading a shared prefix once gains on CPU: `python -m benchmarks.shared_prefix MODEL`.

Two engines take turns at rounds of prefix_32, one of them with `disable_cascade_attn`. Then
attention over the pages of one of their decoding steps takes turns with and without its group. One
JSON line for each, and for the ratios. Processor seconds: a machine's other work does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.records import record, write
from benchmarks.workloads import build, vocab_size
from jaxserve import LLM, SamplingParams
from kernels_pallas import cpu
from kernels_pallas.paged_attention.cases import batch

ROWS, PREFIX, OWN = 32, 512, 48  # of a step half way through prefix_32


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of a call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def serve(model: Path, **settings: Any) -> LLM:
    llm = LLM(model, max_model_len=1024, progress=False, **settings)
    llm.wait_until_warm()
    return llm


def round_of(llm: LLM, vocab: int, number: int) -> Callable[[], Any]:
    work = build("prefix_32", vocab, number)
    params = SamplingParams(temperature=0, max_tokens=work.lengths[0], ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts]
    return lambda: llm.generate(prompts, params)


def attention(llm: LLM, grouped: bool) -> Callable[[], Any]:
    """Attention in all layers of a step, which shares `PREFIX` keys whether it says so or not."""
    plan, cfg = llm.plan, llm.model_config
    (K, H, _), Z = plan.kv_shape, plan.page_size
    step, P = batch((1,) * ROWS, (PREFIX + OWN,) * ROWS, Z, shared=((0, ROWS, PREFIX),))
    step = jax.tree.map(jnp.asarray, step if grouped else step._replace(groups=None))
    q, k, v = (jnp.ones((ROWS, n, H)) for n in (cfg.heads, K, K))
    pages = [jnp.zeros((P, K, Z, H), plan.kv_dtype) for _ in range(2)]
    run = jax.jit(
        lambda k_pages, v_pages: cpu.paged_attention(
            q, k, v, k_pages, v_pages, None, *step, scale=H**-0.5
        ),
        donate_argnums=(0, 1),
    )

    def once() -> None:
        for _ in range(cfg.num_layers):
            pages[:] = run(*pages)[2:]
        jax.block_until_ready(pages)

    return once


def turns(runs: dict[str, Callable[[int], Callable[[], Any]]], rounds: int) -> dict[str, list]:
    """Seconds of each in each round; the round before the first warms up."""
    found = [{name: seconds(run(i)) for name, run in runs.items()} for i in range(rounds + 1)]
    return {name: [each[name] for each in found[1:]] for name in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8", "int4"), default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = {"quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
    vocab = vocab_size(args.model)
    engines = {
        "shared": serve(args.model, **settings),
        "each": serve(args.model, disable_cascade_attn=True, **settings),
    }
    times = {
        "prefix_32": turns(
            {k: lambda i, llm=llm: round_of(llm, vocab, i) for k, llm in engines.items()},
            args.rounds,
        )
    }
    if args.kv_cache_dtype == "auto":  # others have scales
        runs = {k: attention(llm, k == "shared") for k, llm in engines.items()}
        times["attention"] = turns(
            {k: lambda _, run=run: run for k, run in runs.items()}, 5 * args.rounds
        )
    for workload, found in times.items():
        ratios = [a / b for a, b in zip(found["each"], found["shared"], strict=True)]
        about = {"model": args.model.name, **settings}
        for name, values in found.items():
            write(record(name, workload, values, "processor s", **about), args.out)
        write(record("each/shared", workload, ratios, "1", **about), args.out)
    for llm in engines.values():
        llm.shutdown()


if __name__ == "__main__":
    main()
