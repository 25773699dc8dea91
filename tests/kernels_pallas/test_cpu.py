"""Native CPU kernels against plain numpy, and their promise of batch invariance, bit for bit."""

import json
import os
import subprocess
import sys
import threading
from copy import copy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cpu
from kernels_pallas.rope import rotate

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

DTYPES = ("float32", "bfloat16", "uint16")


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def stored(x, dtype):
    """x as the kernels may receive it, and the numbers it then stands for."""
    if dtype == "float32":
        return jnp.asarray(x), x.astype(np.float64)
    rounded = jnp.asarray(x, jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(rounded, jnp.uint16) if dtype == "uint16" else rounded
    return bits, np.asarray(rounded.astype(jnp.float32), np.float64)


def rounded_like(x, dtype):
    return stored(x, "float32" if dtype == "float32" else "bfloat16")[1]


def assert_close(got, want, tolerance=2e-6):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance * max(1e-30, np.abs(want).max()), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2048, 96), (33, 7), (100, 37), (64, 1), (5000, 13)])
@pytest.mark.parametrize("rows", [1, 6, 131])
def test_linear(dtype, shape, rows):
    k, n = shape
    x = normal(0, rows, k)
    w, exact = stored(normal(1, n, k), dtype)
    (y,) = jax.jit(lambda x, w: cpu.linear(x, (w,)))(x, w)
    assert_close(y, rounded_like(x, dtype) @ exact.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_many_weights_layers_and_padding(dtype):
    x = normal(0, 9, 80)
    (wq, q), (wk, k) = (stored(normal(s, 3, n, 80), dtype) for s, n in ((1, 50), (2, 11)))
    run = jax.jit(
        lambda x, wq, wk, layer, rows: cpu.linear(x, (wq, wk), layer=layer, num_rows=rows)
    )
    for layer in range(3):
        yq, yk = run(x, wq, wk, layer, 7)
        exact = rounded_like(x[:7], dtype)
        assert_close(yq[:7], exact @ q[layer].T)
        assert_close(yk[:7], exact @ k[layer].T)
        assert not np.asarray(yq[7:]).any() and not np.asarray(yk[7:]).any()


def test_linear_takes_bfloat16_rows():
    x, w = (jnp.asarray(normal(s, 5, 64), jnp.bfloat16) for s in (0, 1))
    (want,) = cpu.linear(x.astype(jnp.float32), (w,))
    for rows in (x, jax.lax.bitcast_convert_type(x, jnp.uint16)):
        np.testing.assert_array_equal(cpu.linear(rows, (w,))[0], want)


@pytest.mark.parametrize(
    ("dtype", "k"),  # 1056 goes by tiles, where there are some; 128 turns weights for many rows
    [*((dtype, k) for dtype in DTYPES for k in (2500, 90)), ("bfloat16", 1056), ("bfloat16", 128)],
)
def test_linear_rows_do_not_depend_on_their_neighbours(dtype, k):
    x = normal(0, 70, k)
    w, _ = stored(normal(1, 37, k), dtype)
    run = jax.jit(lambda x, rows: cpu.linear(x, (w,), num_rows=rows)[0])
    all_rows = np.asarray(run(x, 70))
    for rows in range(1, 71):
        np.testing.assert_array_equal(run(x, rows)[:rows], all_rows[:rows])
        last = run(np.roll(x, rows, 0), rows)
        np.testing.assert_array_equal(last[:rows], all_rows[70 - rows :])


def test_linear_inside_scan_and_while():
    x, w = normal(0, 4, 64), normal(1, 5, 64, 64, scale=0.1)
    step = lambda x, i: cpu.linear(x, (w,), layer=i)[0]  # noqa: E731
    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, i: (step(x, i), None), x, jnp.arange(5))[0])
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda i, x: step(x, i), x))
    want = x.astype(np.float64)
    for layer in w:
        want = want @ layer.T.astype(np.float64)
    assert_close(scanned(x), want, 1e-5)
    np.testing.assert_array_equal(scanned(x), looped(x))


def activate(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 19, 140])
@pytest.mark.parametrize("k", [72, 128])
def test_gated_linear(dtype, activation, rows, k):
    x = normal(0, rows + 2, k)
    (w_gate, gate), (w_up, up) = (stored(normal(s, 2, 101, k), dtype) for s in (1, 2))
    run = jax.jit(lambda x: cpu.gated_linear(x, w_gate, w_up, layer=1, num_rows=rows,
                                             activation=activation))  # fmt: skip
    exact = rounded_like(x[:rows], dtype)
    want = activate(activation, exact @ gate[1].T) * (exact @ up[1].T)
    assert_close(run(x)[:rows], want)
    np.testing.assert_array_equal(run(x)[:1], run(x[:1].repeat(rows + 2, 0))[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2048, 128, 50])
def test_rms_norm(dtype, width):
    x = normal(0, 300, width, scale=3.0)
    scale, exact = stored(normal(1, 2, width), dtype)
    run = jax.jit(
        lambda x, rows: cpu.rms_norm(x, scale, eps=1e-6, layer=1, num_rows=rows, offset=1.0)
    )
    got = run(x, 290)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (1 + exact[1])
    assert_close(got[:290], want[:290], 1e-6)
    assert not np.asarray(got[290:]).any()
    np.testing.assert_array_equal(run(x[:1], 1), got[:1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [32, 5])
def test_rope(pairs, interleaved):
    x, angles = normal(0, 70, 3, 64), normal(1, 70, pairs, scale=9.0)
    cos, sin = np.cos(angles), np.sin(angles)
    run = jax.jit(partial(cpu.rope, interleaved=interleaved))
    got = run(x, cos, sin, num_rows=66)
    table = (jnp.asarray(cos)[None, :, None], jnp.asarray(sin)[None, :, None])
    want = rotate(jnp.asarray(x)[None], table, interleaved=interleaved)[0]
    assert_close(got[:66], want[:66], 1e-6)
    assert not np.asarray(got[66:]).any()
    np.testing.assert_array_equal(run(x[:1], cos[:1], sin[:1]), got[:1])


@pytest.mark.parametrize("width", [7, 5_000, 100_003])
def test_argmax(width):
    x = normal(0, 6, width)
    x[1, [width // 3, width - 2]] = 9.0  # the first of two
    x[2, -1] = np.inf
    x[3, width // 2] = np.nan
    x[4] = -np.inf
    ids, tops = jax.jit(cpu.argmax)(x, num_rows=5)
    np.testing.assert_array_equal(ids[:3], x[:3].argmax(-1))
    np.testing.assert_array_equal(tops[:5], x[:5].max(-1))
    assert ids[4] == 0
    assert tops[5] == 0 == ids[5]
    last = x[:1].copy()
    last[0, -1] = np.nan
    assert np.isnan(jax.jit(cpu.argmax)(last)[1][0])


class Paged:
    """A random batch: `lens` are (new tokens, context length) per sequence."""

    def __init__(self, lens, heads, kv_heads, width, value, dtype, *, page=16, latent=False, pad=3):
        rng = np.random.default_rng(0)
        self.lens, self.dtype, self.value = lens, dtype, value
        pages = [-(-length // page) for _, length in lens]
        ids = rng.permutation(sum(pages) + 2)
        self.tables = np.full((len(lens) + 2, max([*pages, 1])), -1, np.int32)
        for r, count in enumerate(pages):
            self.tables[r, :count] = ids[sum(pages[:r]) :][:count]
        new = [n for n, _ in lens]
        self.row_starts = np.concatenate([np.cumsum([0, *new]), [sum(new)] * 2]).astype(np.int32)
        self.kv_lens = np.array([length for _, length in lens] + [0, 0], np.int32)
        tokens = sum(new) + pad
        self.q = normal(1, tokens, heads, width)
        self.k = normal(2, tokens, kv_heads, width)
        self.v = None if latent else normal(3, tokens, kv_heads, value)
        shape = (2, len(ids), kv_heads, page)
        self.k_pages = stored(normal(4, *shape, width), dtype)
        self.v_pages = (None, None) if latent else stored(normal(5, *shape, value), dtype)

    def run(self, **options):
        run = jax.jit(cpu.paged_attention, static_argnames=("scale", "soft_cap", "value_dim"))
        return run(self.q, self.k, self.v, self.k_pages[0], self.v_pages[0], 1, self.row_starts,
                   self.kv_lens, self.tables, len(self.lens), scale=self.q.shape[-1] ** -0.5,
                   value_dim=self.value, **options)  # fmt: skip

    def written(self):
        """The pages after the step: the reference for the stores."""
        stores = [(self.k_pages[1].copy(), self.k)]
        if self.v is not None:
            stores.append((self.v_pages[1].copy(), self.v))
        for pages, x in stores:
            for r, (new, length) in enumerate(self.lens):
                for i in range(new):
                    page, slot = divmod(length - new + i, pages.shape[3])
                    row = rounded_like(x[self.row_starts[r] + i], self.dtype)
                    pages[1, self.tables[r, page], :, slot] = row
        return [pages for pages, _ in stores]

    def expected(self, window=0, soft_cap=0.0, sinks=None):
        written = self.written()
        group = self.q.shape[1] // self.k.shape[1]
        out = np.zeros((*self.q.shape[:2], self.value))
        lse = np.zeros(self.q.shape[:2])
        for r, (new, length) in enumerate(self.lens):
            k, v = (p[1, self.tables[r]].swapaxes(1, 2) for p in (written[0], written[-1]))
            k, v = (x.reshape(-1, *x.shape[2:])[:length].repeat(group, 1) for x in (k, v))
            q = rounded_like(self.q[self.row_starts[r] :][:new], self.dtype)
            s = np.einsum("tnh,snh->tns", q, k) * self.q.shape[-1] ** -0.5
            s = soft_cap * np.tanh(s / soft_cap) if soft_cap else s
            distance = (length - new + np.arange(new))[:, None] - np.arange(length)
            seen = (distance >= 0) & (distance < (window or length + 1))
            s = np.where(seen[:, None], s, -np.inf)
            if sinks is not None:
                s = np.concatenate([s, np.broadcast_to(sinks[:, None], (new, len(sinks), 1))], -1)
            total = np.log(np.exp(s).sum(-1))
            weights = np.exp(s - total[..., None])[..., :length]
            rows = slice(self.row_starts[r], self.row_starts[r] + new)
            lse[rows] = total
            out[rows] = np.einsum("tns,snh->tnh", weights, v[..., : self.value])
        return out, lse


MIXED = [(1, 1), (0, 0), (1, 200), (70, 70), (33, 133), (0, 40), (1, 64), (5, 69)]
HEADS = [(4, 4, 64, 64), (8, 2, 80, 48), (6, 1, 128, 128), (16, 1, 576, 512), (2, 2, 31, 17)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_paged_attention(dtype, heads):
    batch = Paged(MIXED, *heads, dtype, latent=heads[2] == 576)
    out, lse, *pages = batch.run()
    want, want_lse = batch.expected()
    tolerance = 1e-5 if dtype == "float32" else 1e-2  # probabilities are rounded to bfloat16
    assert_close(out, want, tolerance)
    assert_close(lse, want_lse, 1e-5)
    for got, want in zip(pages, batch.written(), strict=False):
        np.testing.assert_array_equal(rounded_bits(got), want)


def rounded_bits(pages):
    if pages.dtype == jnp.uint16:
        pages = jax.lax.bitcast_convert_type(pages, jnp.bfloat16)
    return np.asarray(pages.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("page", [1, 8, 48, 256])
def test_paged_attention_any_page_size(page):
    batch = Paged(MIXED, 4, 2, 64, 64, "float32", page=page)
    assert_close(batch.run()[0], batch.expected()[0], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("window", [0, 1, 16, 100])
@pytest.mark.parametrize("soft_cap", [0.0, 1.5, -1.5])  # cap * tanh(s / cap) knows no sign
@pytest.mark.parametrize("sinks", [False, True])
def test_paged_attention_options(dtype, window, soft_cap, sinks):
    batch = Paged(MIXED, 8, 2, 64, 64, dtype)
    logits = normal(7, 2, 8) if sinks else None
    out, lse, _, _ = batch.run(window=window, soft_cap=soft_cap, sinks=logits)
    want, want_lse = batch.expected(window, soft_cap, logits[1] if sinks else None)
    assert_close(out, want, 1e-5 if dtype == "float32" else 1e-2)
    assert_close(lse, want_lse, 2e-5)


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("heads", [(8, 2, 64, 64), (3, 3, 80, 80), (70, 1, 96, 64)], ids=str)
def test_paged_attention_does_not_depend_on_chunking(dtype, window, heads):
    """One prompt of 150 tokens at once, in chunks, and token by token: the same bits."""
    length = 150
    whole = Paged([(length, length)], *heads, dtype, latent=heads[2] == 96, pad=0)
    want, want_lse, *want_pages = whole.run(window=window)
    for size in (1, 7, 64, 100):
        got, k_pages, v_pages = [], whole.k_pages[0], whole.v_pages[0]
        for begin in range(0, length, size):
            end = min(length, begin + size)
            part = copy(whole)
            part.q, part.k = whole.q[begin:end], whole.k[begin:end]
            part.v = None if whole.v is None else whole.v[begin:end]
            part.k_pages, part.v_pages = (k_pages, None), (v_pages, None)
            part.row_starts = np.array([0, end - begin, end - begin, end - begin], np.int32)
            part.kv_lens = np.array([end, 0, 0], np.int32)
            out, lse, k_pages, v_pages = part.run(window=window)
            got.append((out, lse))
        np.testing.assert_array_equal(np.concatenate([out for out, _ in got]), want)
        np.testing.assert_array_equal(np.concatenate([lse for _, lse in got]), want_lse)
        np.testing.assert_array_equal(k_pages, want_pages[0])


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_paged_attention_to_what_is_not_finite_says_so(dtype, soft_cap, bad):
    """Of a query: all of its outputs. Of a key: those of queries that see it."""
    batch = Paged([(1, 40), (70, 133)], 4, 2, 64, 64, dtype)
    want, want_lse, *_ = batch.run(soft_cap=soft_cap)
    batch.q[20, 1, 5] = bad
    batch.k[60, 1, 7] = np.nan
    out, lse, *_ = batch.run(soft_cap=soft_cap)
    lost = np.zeros((74, 4), bool)
    lost[20, 1] = not soft_cap or np.isnan(bad)
    lost[60:71, 2:] = True
    np.testing.assert_array_equal(np.isnan(out).all(-1), lost)
    np.testing.assert_array_equal(np.isnan(lse), lost)
    lost[20, 1] = True  # infinite logits may be capped
    np.testing.assert_array_equal(out[~lost], np.asarray(want)[~lost])
    np.testing.assert_array_equal(lse[~lost], np.asarray(want_lse)[~lost])


def test_paged_attention_shares_pages_written_in_this_step():
    """Two sequences with one table: the second asks about tokens the first one stores."""
    batch = Paged([(32, 32), (1, 33)], 4, 2, 64, 64, "float32")
    alone = Paged([(32, 32), (1, 33)], 4, 2, 64, 64, "float32")
    batch.tables[1, :2] = batch.tables[0, :2]
    alone.tables[1, :2] = batch.tables[0, :2]
    alone.row_starts = np.array([0, 33, 33, 33, 33], np.int32)
    alone.kv_lens = np.array([33, 0, 0, 0], np.int32)
    alone.tables[0] = batch.tables[1]
    np.testing.assert_array_equal(batch.run()[0][:33], alone.run()[0][:33])


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_updates_donated_pages_in_place(dtype):
    batch = Paged([(1, 40)], 4, 2, 64, 64, dtype)

    def layer(pages, i):
        _, _, k, v = cpu.paged_attention(batch.q, batch.k, batch.v, *pages, i, batch.row_starts,
                                         batch.kv_lens, batch.tables, 1, scale=0.125)  # fmt: skip
        return (k, v), None

    step = jax.jit(lambda pages: jax.lax.scan(layer, pages, jnp.arange(2))[0], donate_argnums=0)
    pages = tuple(jnp.array(p) for p in (batch.k_pages[0], batch.v_pages[0]))
    before = [p.unsafe_buffer_pointer() for p in pages]
    memory = step.lower(pages).compile().memory_analysis()
    assert memory is None or memory.temp_size_in_bytes < pages[0].nbytes // 2
    after = step(pages)
    assert [p.unsafe_buffer_pointer() for p in after] == before


def expert_case(dtype, rows, active, num_experts=5, mlp=70, embed=100):
    rng = np.random.default_rng(rows)
    ids = rng.integers(0, num_experts, (rows, active)).astype(np.int32)
    ids[rows // 2, 0] = -1
    weights = rng.uniform(size=ids.shape).astype(np.float32)
    shapes = [(num_experts, mlp, embed)] * 2 + [(num_experts, embed, mlp)]
    w = [stored(normal(s, 2, *shape, scale=0.3), dtype) for s, shape in enumerate(shapes)]
    return normal(9, rows, embed), ids, weights, w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 140, 1100])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_experts(dtype, rows, activation):
    x, ids, weights, w = expert_case(dtype, rows + 2, 3)
    run = jax.jit(cpu.experts, static_argnames="activation")
    got = run(x, ids, weights, *(s for s, _ in w), layer=1, num_rows=rows, activation=activation)
    gate, up, down = (exact[1] for _, exact in w)
    wide = rounded_like(x, dtype)
    want = np.zeros(x.shape)
    for t, a in np.ndindex(rows, 3):
        if (e := ids[t, a]) >= 0:
            hidden = activate(activation, gate[e] @ wide[t]) * (up[e] @ wide[t])
            want[t] += weights[t, a] * (down[e] @ rounded_like(hidden.astype(np.float32), dtype))
    assert_close(got, want, 1e-5 if dtype == "float32" else 2e-3)


@pytest.mark.parametrize(
    ("dtype", "mlp", "embed"), [("float32", 70, 100), ("uint16", 70, 100), ("uint16", 96, 128)]
)
def test_experts_rows_do_not_depend_on_their_neighbours(dtype, mlp, embed):
    x, ids, weights, w = expert_case(dtype, 70, 3, mlp=mlp, embed=embed)
    run = jax.jit(lambda rows, *x: cpu.experts(*x, *(s for s, _ in w), layer=0, num_rows=rows))
    want = np.asarray(run(70, x, ids, weights))
    for rows in range(1, 71):
        last = run(rows, *(np.roll(of_rows, rows, 0) for of_rows in (x, ids, weights)))
        np.testing.assert_array_equal(last[:rows], want[-rows:])


def test_handlers_may_run_at_the_same_time():
    x, w = normal(0, 40, 256), normal(1, 300, 256)
    run = jax.jit(lambda x: cpu.linear(x, (w,))[0])
    want, wrong = np.asarray(run(x)), []

    def work():
        for _ in range(50):
            if not np.array_equal(run(x), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SCRIPT = """
import sys, jax, jax.numpy as jnp, numpy as np
from kernels_pallas import cpu
from kernels_pallas.rope import rotate
if not cpu.available(): sys.exit("off")
x = jax.random.normal(jax.random.key(0), (50, 200))
w = jax.random.normal(jax.random.key(1), (333, 200))
run = jax.jit(lambda x, w: cpu.linear(x, (w,))[0]).lower(x, w).compile()
sys.stdout.write(np.asarray(run(x, w)).tobytes().hex())
"""


CORES = f"""
import os
{SCRIPT}
cores = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
print("", sorted(len(x) for x in cores))
"""


def run_script(tmp_path, script=SCRIPT, **environment):
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_threads_do_not_change_bits_and_compiled_programs_load_again(tmp_path):
    runs = [run_script(tmp_path, JAXSERVE_NUM_THREADS=str(n)) for n in (1, 2, 5)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert any((tmp_path / "xla").iterdir())
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout != ""


@pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="needs Linux and two cores"
)
def test_helpers_keep_off_the_core_of_their_caller(tmp_path):
    run = run_script(tmp_path, CORES, JAXSERVE_NUM_THREADS="2")
    assert run.returncode == 0, run.stderr
    helper, *others = json.loads(run.stdout.split(" ", 1)[1])
    cores = len(os.sched_getaffinity(0))
    assert helper == cores - 1
    assert others == [cores] * len(others) != []


def test_unavailable_is_an_answer_not_an_error(tmp_path):
    off = run_script(tmp_path, JAXSERVE_NATIVE="0")
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho error: no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    environment = {"CXX": str(broken), "JAXSERVE_CACHE_DIR": str(tmp_path / "cache")}
    failed = run_script(tmp_path, **environment)
    times = broken.stat().st_atime_ns, broken.stat().st_mtime_ns
    broken.write_text("#!/bin/sh\necho error: asked again! >&2\nexit 1\n")  # as long as before
    os.utime(broken, ns=times)
    remembered = run_script(tmp_path, **environment)
    for run in (off, failed, remembered):
        assert run.returncode == 1
        assert run.stderr.strip().endswith("off")
    assert "no such luck" in failed.stderr
    assert "no such luck" in remembered.stderr
