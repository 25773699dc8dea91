"""What reading a shared prefix once could gain on CPU: `python -m benchmarks.shared_prefix MODEL`.

Serves rounds of prefix_32 and times, in the same process, attention alone over the pages of one of
its decoding steps: with the prefix, without it, and for 32 tokens of one sequence behind the
prefix, which share its keys as the rows of a group would. Processor seconds, not wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workloads import build, vocab_size
from jaxserve import LLM, SamplingParams
from kernels_pallas import cpu
from kernels_pallas.paged_attention.cases import batch

ROWS, PREFIX, OWN = 32, 512, 48  # of a step half way through prefix_32


def seconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median processor time of a call."""
    run()
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return float(np.median(taken))


def attention(llm: LLM, new: tuple[int, ...], keys: int, shared: int = 0) -> float:
    """Processor seconds of attention in all layers, for sequences with so many new tokens and keys,
    of which the first `shared` lie in the same pages."""
    plan, cfg = llm.plan, llm._runner.cfg
    (K, H, _), Z = plan.kv_shape, plan.page_size
    rows, groups = len(new), ((0, len(new), shared),) if shared else ()
    step, P = batch(new, (keys,) * rows, Z, shared=groups)
    q, k, v = (jnp.ones((sum(new), n, H)) for n in (cfg.heads, K, K))
    pages = [jnp.zeros((P, K, Z, H), plan.kv_dtype) for _ in range(2)]
    run = jax.jit(
        lambda k_pages, v_pages: cpu.paged_attention(
            q, k, v, k_pages, v_pages, None, *map(jnp.asarray, step[:4]), scale=H**-0.5
        ),
        donate_argnums=(0, 1),
    )

    def once() -> None:
        pages[:] = jax.block_until_ready(run(*pages))[2:]

    return cfg.num_layers * seconds(once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    path = parser.parse_args().model
    llm = LLM(path, background_compile=False, progress=False)
    served = []
    for round in range(3):
        work = build("prefix_32", vocab_size(path), round)
        started, before = time.process_time(), llm.stats().num_steps
        params = SamplingParams(max_tokens=work.lengths[0], ignore_eos=True)
        llm.generate(work.prompts, params)
        served.append((time.process_time() - started, llm.stats().num_steps - before))
    total, steps = served[int(np.argsort([s for s, _ in served])[1])]
    whole, own = attention(llm, (1,) * ROWS, PREFIX + OWN, PREFIX), attention(llm, (1,) * ROWS, OWN)
    together = attention(llm, (ROWS,), PREFIX + ROWS)
    print(f"a round: {total:.2f} s of the processor, {steps} steps")
    print(f"attention of a step: {1e3 * whole:.1f} ms, {1e3 * own:.1f} of it without the prefix")
    print(f"{ROWS} tokens that share the keys of the prefix: {1e3 * together:.1f} ms")
    gain = work.lengths[0] * (whole - own - together) / total
    print(f"what a group would save of the round: {100 * gain:.1f} %")
    llm.shutdown()


if __name__ == "__main__":
    main()
