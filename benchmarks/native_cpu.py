"""Native CPU kernels against torch, alternating, best of many: one JSON line per case.

python benchmarks/native_cpu.py [linear attention experts] [--seconds 3] [--one-thread]

With --one-thread the clock is CPU time, which a busy machine disturbs least.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ONE_THREAD = "--one-thread" in sys.argv
os.environ["JAX_PLATFORMS"] = "cpu"
if ONE_THREAD:  # before anything counts the cores
    os.environ |= {"JAXSERVE_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from kernels_pallas import cpu  # noqa: E402

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = None

clock = time.process_time if ONE_THREAD else time.perf_counter
Contestants = dict[str, Callable[[], object]]


def best_seconds(contestants: Contestants, seconds: float) -> dict[str, float]:
    """Best time of each, in turns, so that a busy machine disturbs all of them alike."""
    best = dict.fromkeys(contestants, float("inf"))
    for run in contestants.values():
        run()
    deadline, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < deadline:
        for name, run in contestants.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
        rounds += 1
    return best


def report(name: str, best: dict[str, float], *, gbytes: float = 0, gflops: float = 0) -> None:
    line = {"name": name} | {f"{who}_ms": round(s * 1e3, 3) for who, s in best.items()}
    for unit, amount in (("gb_s", gbytes), ("gflop_s", gflops)):
        if amount:
            line |= {f"{who}_{unit}": round(amount / s, 1) for who, s in best.items()}
    if "torch" in best:
        line["ratio"] = round(best["torch"] / best["native"], 2)
    print(json.dumps(line), flush=True)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale"))
def _normal(key, shape, dtype, scale):  # the key is an argument, or XLA would fold the constant
    return (jax.random.normal(key, shape) * scale).astype(dtype)


def normal(*shape: int, dtype=jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    return _normal(jax.random.key(0), shape, dtype, scale)


def bits(x: jax.Array) -> jax.Array:  # jax 0.10 converts whole bfloat16 stacks; uint16 is left be
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def to_torch(x: jax.Array):
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(bits(x)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def linear_cases(seconds: float) -> None:
    for dtype in (jnp.bfloat16, jnp.float32):
        for layers, width in ((48, 2048), (28, 1024), (28, 768)):
            weights = normal(layers, width, width, dtype=dtype, scale=0.02)
            for rows in (1, 8, 16, 64, 512, 2048):
                used = layers if rows < 512 else 4
                best = best_seconds(dict(linear_contestants(weights[:used], rows)), seconds)
                size = used * width * width
                report(f"linear {jnp.dtype(dtype).name} {used}x{width}x{width} rows={rows}", best,
                       gbytes=size * dtype(0).itemsize / 1e9,
                       gflops=2 * size * rows / 1e9)  # fmt: skip


def linear_contestants(weights: jax.Array, rows: int) -> Iterator[tuple[str, Callable]]:
    x, stack, layers = jnp.ones((rows, weights.shape[-1])), bits(weights), len(weights)

    @jax.jit
    def native(x, stack):
        step = lambda x, i: (cpu.linear(x, (stack,), layer=i)[0], None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.arange(layers))[0]

    yield "native", lambda: native(x, stack).block_until_ready()
    if torch is None:
        return
    matrices = list(to_torch(weights))
    y = torch.ones(rows, weights.shape[-1], dtype=matrices[0].dtype)

    def contestant():
        with torch.inference_mode():
            return functools.reduce(F.linear, matrices, y)

    yield "torch", contestant


def attention_cases(seconds: float) -> None:
    for name, seqs, new, length, heads, kv_heads, width in (
        ("decode", 1, 1, 4096, 16, 8, 128),
        ("decode", 16, 1, 1024, 16, 8, 128),
        ("decode", 16, 1, 1024, 8, 8, 64),
        ("prefill", 1, 1024, 1024, 16, 8, 128),
        ("prefill", 8, 256, 256, 16, 8, 128),
        ("prefill", 1, 4096, 4096, 16, 16, 64),
    ):
        contestants = dict(attention_contestants(seqs, new, length, heads, kv_heads, width))
        pairs = seqs * (new * length - new * (new - 1) // 2)  # causal (query, key) pairs
        report(f"{name} {seqs}x{new} of {length}, heads {heads}/{kv_heads} x {width}",
               best_seconds(contestants, seconds),
               gbytes=8 * seqs * length * kv_heads * width * 2 * 2 / 1e9 if new == 1 else 0,
               gflops=4 * pairs * heads * width / 1e9)  # fmt: skip


def attention_contestants(seqs, new, length, heads, kv_heads, width):
    page, layers = 16, 8 if new == 1 else 1
    per_seq = -(-length // page)
    tables = np.random.default_rng(0).permutation(seqs * per_seq).reshape(seqs, -1)
    pages = bits(normal(layers, seqs * per_seq, kv_heads, page, width))
    q, k = (
        normal(seqs * new, heads, width, dtype=jnp.float32),
        jnp.ones((seqs * new, kv_heads, width)),
    )
    batch = (jnp.arange(seqs + 1) * new, jnp.full(seqs, length), jnp.asarray(tables))
    batch = tuple(x.astype(jnp.int32) for x in batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def native(cache, q, k, batch):
        def step(carry, i):
            out, _, *cache = cpu.paged_attention(
                q, k, k, *carry, i, *batch, seqs, scale=width**-0.5
            )
            return tuple(cache), out[0]

        return jax.lax.scan(step, cache, jnp.arange(layers))

    cache = [(pages, pages + 0)]

    def run():
        after, out = native(cache[0], q, k, batch)
        cache[0] = after
        return out.block_until_ready()

    yield "native", run
    if torch is None:
        return
    tq = to_torch(q.astype(jnp.bfloat16)).reshape(seqs, new, heads, width).transpose(1, 2)
    keys = [to_torch(normal(seqs, kv_heads, length, width)) for _ in range(layers)]

    def contestant():
        with torch.inference_mode():
            for kv in keys:
                F.scaled_dot_product_attention(tq, kv, kv, is_causal=new > 1, enable_gqa=True)

    yield "torch", contestant


def expert_cases(seconds: float) -> None:
    layers, num, active, embed, mlp = 4, 32, 4, 1024, 512
    gate, up, down = (
        normal(layers, num, *s, scale=0.02) for s in ((mlp, embed),) * 2 + ((embed, mlp),)
    )
    for rows in (1, 16, 256, 2048):
        rng = np.random.default_rng(rows)
        ids = np.stack([rng.permutation(num)[:active] for _ in range(rows)]).astype(np.int32)
        used = len(np.unique(ids))
        contestants = dict(expert_contestants(rows, ids, gate, up, down))
        report(f"experts {active} of {num}, {embed}x{mlp}, rows={rows}",
               best_seconds(contestants, seconds),
               gbytes=layers * used * 3 * embed * mlp * 2 / 1e9,
               gflops=layers * rows * active * 6 * embed * mlp / 1e9)  # fmt: skip


def expert_contestants(rows, ids, gate, up, down):
    layers = len(gate)
    x, weights = normal(rows, gate.shape[-1], dtype=jnp.float32), jnp.full(ids.shape, 0.25)

    @jax.jit
    def native(x, ids, *stacks):
        step = lambda x, i: (x + cpu.experts(x, ids, weights, *stacks, layer=i), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.arange(layers))[0]

    stacks = [bits(w) for w in (gate, up, down)]
    yield "native", lambda: native(x, ids, *stacks).block_until_ready()
    if torch is None:
        return
    start, chosen = to_torch(x.astype(jnp.bfloat16)), torch.from_numpy(ids.astype(np.int64))
    matrices = [to_torch(w) for w in (gate, up, down)]

    def layer(x, gate, up, down):
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            rows = (chosen == e).any(-1).nonzero()[:, 0]
            y = F.linear(F.silu(F.linear(x[rows], gate[e])) * F.linear(x[rows], up[e]), down[e])
            out.index_add_(0, rows, y, alpha=0.25)
        return x + out

    def contestant():
        with torch.inference_mode():
            return functools.reduce(lambda x, w: layer(x, *w), zip(*matrices, strict=True), start)

    yield "torch", contestant


CASES = {"linear": linear_cases, "attention": attention_cases, "experts": expert_cases}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case")
    parser.add_argument("--one-thread", action="store_true")
    arguments = parser.parse_args()
    for case in arguments.cases:
        CASES[case](arguments.seconds)
