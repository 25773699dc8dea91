"""The share of memory speed that a single stream reaches: `python -m benchmarks.bandwidth MODEL`.

A decoding step of one sequence reads every weight of a dense model once, but for the table of the
embedding. In turns: 128 tokens of one stream, and a plain read of an array that no cache holds, by
as many threads. One JSON line for each, and one for the share of the second that the first reaches.
Keys and values are left out of the count, and so are the host and the sampler's passes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import workloads
from benchmarks.records import record, write
from jaxserve import LLM, SamplingParams
from kernels_pallas import cpu

READ_BYTES = 1 << 29


def weight_bytes(llm: LLM) -> int:
    """Bytes of the weights that each step of a dense model reads."""
    params = llm.params
    looked_up = params.embed.nbytes if params.lm_head is not None else 0  # rows of it alone
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - looked_up


def reader():
    """A read of `READ_BYTES`, as fast as is known here: a product with one row, or a maximum."""
    matrix = jnp.zeros((READ_BYTES // 4 // 4096, 4096))
    if cpu.available():
        row = jnp.ones((1, 4096))
        product = jax.jit(lambda x, w: cpu.linear(x, (w,)))
        return lambda: jax.block_until_ready(product(row, matrix))
    largest = jax.jit(lambda w: w.max(1))
    return lambda: jax.block_until_ready(largest(matrix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llm = LLM(args.model, quantization=args.quantization, max_model_len=512, progress=False)
    llm.wait_until_warm()
    size, read = weight_bytes(llm), reader()
    read()
    rates: dict[str, list[float]] = {"decode": [], "read": []}
    for number in range(args.rounds + 1):
        work = workloads.build("single_decode", llm.model_config.vocab, number)
        params = SamplingParams(temperature=0, max_tokens=work.lengths[0], ignore_eos=True)
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": work.prompts[0]}], params)
        rates["decode"].append(size * work.lengths[0] / (time.perf_counter() - begin) / 1e9)
        begin = time.perf_counter()
        for _ in range(4):
            read()
        rates["read"].append(4 * READ_BYTES / (time.perf_counter() - begin) / 1e9)
    decode, plain = rates["decode"][1:], rates["read"][1:]  # the first warms up
    shares = [a / b for a, b in zip(decode, plain, strict=True)]
    about = {"model": args.model.name, "quantization": args.quantization, "weight_bytes": size}
    for name, values, unit in (
        ("decode", decode, "GB/s"),
        ("read", plain, "GB/s"),
        ("share_of_read", shares, "1"),
    ):
        write(record("jaxserve", name, values, unit, **about), args.out)
    print(f"# {statistics.median(shares):.0%} of what a plain read reaches")


if __name__ == "__main__":
    main()
