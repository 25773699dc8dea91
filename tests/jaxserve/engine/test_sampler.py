"""Sampling against plain numpy in float64, in vLLM's order: bias, penalties, then the filters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.sampler import (
    MAX_BIAS,
    Sampled,
    SampleInputs,
    _uniform,
    argmax,
    logprobs_of,
    sample,
)

VOCABS = (1, 2, 97, 1000, 151936)
CONTEXT = 24
run = jax.jit(sample)


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def inputs(R: int, V: int, **options: Any) -> SampleInputs:
    """Rows that sample plainly, but for what `options` says; numbers hold for every row."""
    uses = {
        "use_penalties": bool({"repetition", "presence", "frequency"} & options.keys()),
        "use_bias": "bias" in options,
        "use_mask": "mask" in options,
        "use_logprobs": options.pop("logprobs", False),
        "use_stats": "confidence_k" in options,
    }
    biases = options.pop("bias", [])
    bias_ids, bias = np.full((R, MAX_BIAS), V, np.int32), np.zeros((R, MAX_BIAS), np.float32)
    for r, entries in enumerate(biases):
        bias_ids[r, : len(entries)] = list(entries)
        bias[r, : len(entries)] = list(entries.values())
    allowed = options.pop("mask", np.ones((R, V), bool))
    bits = np.pad(allowed, ((0, 0), (0, -V % 32))).reshape(R, -1, 32)
    mask = (bits.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
    seeds = options.pop("seeds", np.arange(R))

    def per_row(name: str, default: float, dtype: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(options.pop(name, default), dtype), R).copy()

    made = SampleInputs(
        slots=per_row("slots", 0, np.int32) if "slots" in options else np.arange(R, dtype=np.int32),
        lengths=per_row("lengths", 5, np.int32),
        prompt_lens=per_row("prompt_lens", 3, np.int32),
        top_k=per_row("top_k", 0, np.int32),
        seeds=np.stack([np.asarray(seeds, np.uint32), np.full(R, 7, np.uint32)], 1),
        temperature=per_row("temperature", 1.0, np.float32),
        top_p=per_row("top_p", 1.0, np.float32),
        min_p=per_row("min_p", 0.0, np.float32),
        repetition=per_row("repetition", 1.0, np.float32),
        presence=per_row("presence", 0.0, np.float32),
        frequency=per_row("frequency", 0.0, np.float32),
        bias_ids=bias_ids,
        bias=bias,
        mask=mask,
        confidence_k=per_row("confidence_k", 1, np.int32),
        **{name: np.bool_(used) for name, used in uses.items()},
    )
    assert not options, options
    return made


def draw(logits: np.ndarray, history: np.ndarray | None = None, **options: Any) -> Sampled:
    """Samples rows, padded to one of two batch sizes so that few programs are compiled."""
    R, V = logits.shape
    padding = (0, next(size for size in (12, 4096) if size >= R) - R)
    x = inputs(R, V, **options)
    x = x._replace(
        **{
            name: np.pad(array, (padding, *[(0, 0)] * (array.ndim - 1)))
            for name, array in x._asdict().items()
            if array.ndim
        }
    )
    x.slots[R:] = len(logits) + padding[1]  # out of range: nothing is recorded
    history = np.zeros((R, CONTEXT)) if history is None else history
    blank = np.zeros((R + padding[1], CONTEXT), np.int32)
    blank[: len(history)] = history
    sampled, _ = run(jnp.asarray(np.pad(logits, (padding, (0, 0)))), jnp.asarray(blank), x)
    return Sampled(*(np.asarray(array)[:R] for array in sampled))


def kept(
    scores: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p=0.0
) -> np.ndarray:
    """Probabilities in float64 after vLLM's filters: min-p, top-k, then top-p of what is left."""
    p = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    p[p < min_p] = 0
    if top_k:
        p[p < np.sort(p)[-min(top_k, len(p))]] = 0
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p * p.sum()]] = 0
    return p / p.sum()


def assert_drawn(p: np.ndarray, u: float, token: int) -> None:
    """u falls on the token's stretch of the distribution, give or take float32."""
    ends = np.cumsum(p)
    assert p[token] > 0
    assert ends[token] - p[token] - 2e-5 <= u <= ends[token] + 2e-5


FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k of all": {"top_k": 10**6},
    "top_p": {"top_p": 0.7},
    "top_p of nearly nothing": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "all": {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
}


@pytest.mark.parametrize("V", VOCABS)
def test_a_token_is_where_its_random_number_falls(V: int):
    """Each row has filters of its own; the numbers are those of its seed and position."""
    R = len(FILTERS)
    logits = normal(R, V)
    options = {
        name: [row.get(name, default) for row in FILTERS.values()]
        for name, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    }
    for trial in range(5):
        seeds = np.arange(R) + 100 * trial
        tokens = draw(logits, seeds=seeds, **options).tokens
        x = inputs(R, V, seeds=seeds)
        numbers = np.asarray(_uniform(jnp.asarray(x.seeds), jnp.asarray(x.lengths)))
        for row, token, u, name in zip(logits, tokens, numbers, FILTERS, strict=True):
            assert_drawn(kept(row, **FILTERS[name]), float(u), int(token))


@pytest.mark.parametrize("V", VOCABS)
def test_greedy_is_the_first_largest(V: int):
    logits = normal(3, V)
    logits[1, V // 2 :] = logits[1].max() + 1
    logits[2] = 0.0
    tokens = draw(logits, temperature=0.0).tokens
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_rows_that_sample_leave_greedy_rows_alone():
    logits = normal(6, 97)
    tokens = draw(logits, temperature=[0, 1, 0, 2, 0, 0.5], top_k=[0, 5, 0, 0, 3, 0]).tokens
    assert tokens[[0, 2, 4]].tolist() == logits.argmax(-1)[[0, 2, 4]].tolist()


@pytest.mark.parametrize("temperature", [1e-40, 1e-38, 1e-30, 1e-8, 1e-5])
def test_next_to_no_temperature_is_greedy(temperature: float):
    logits = normal(4, 97, scale=30)
    tokens = draw(logits, temperature=temperature).tokens
    assert tokens.tolist() == logits.argmax(-1).tolist()


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """In standard deviations of the statistic under p."""
    seen, likely = counts[p > 0], p[p > 0] * counts.sum()
    freedom = max(len(seen) - 1, 1)
    return (((seen - likely) ** 2 / likely).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", ["plain", "cold", "top_k", "top_p", "min_p", "all"])
def test_many_draws_follow_the_distribution(name: str):
    V, R = 12, 4096
    row = normal(V, seed=3, scale=1.5)
    p = kept(row, **FILTERS[name])
    counts = np.zeros(V)
    for batch in range(5):
        tokens = draw(np.tile(row, (R, 1)), seeds=np.arange(R) + R * batch, **FILTERS[name]).tokens
        counts += np.bincount(tokens, minlength=V)
    assert counts[p == 0].sum() == 0
    assert chi_square(counts, p) < 4


def test_neighbouring_positions_are_independent():
    """One seed, many positions: pairs of draws are as likely as their product says."""
    V, R = 12, 4096
    row = normal(V, seed=5, scale=1.0)
    row[4:] = -np.inf
    tokens = draw(np.tile(row, (R, 1)), seeds=np.full(R, 11), lengths=np.arange(R)).tokens
    p = kept(row)
    assert (p > 0).sum() == 4
    pairs = np.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V)
    assert chi_square(pairs, np.outer(p, p).ravel()) < 4


def test_a_draw_depends_on_its_seed_and_position_alone():
    logits = normal(7, 1000)
    options = {"seeds": np.arange(50, 57), "lengths": np.arange(4, 11), "temperature": 2.0}
    top_k = np.array([0, 3, 0, 9, 0, 0, 5])
    together = draw(logits, top_k=top_k, **options).tokens
    backwards = draw(
        logits[::-1],
        seeds=options["seeds"][::-1],
        lengths=options["lengths"][::-1],
        temperature=2.0,
        top_k=top_k[::-1],
    )
    assert backwards.tokens[::-1].tolist() == together.tolist()
    x = inputs(7, 1000, top_k=top_k, **options)
    for r in range(0, 7, 2):
        row = x._replace(**{n: a[[r]] for n, a in x._asdict().items() if a.ndim})
        row.slots[0] = 0
        alone, _ = run(jnp.asarray(logits[[r]]), jnp.zeros((1, CONTEXT), jnp.int32), row)
        assert alone.tokens[0] == together[r]
    other_position = draw(logits, **{**options, "lengths": np.arange(5, 12)}).tokens
    assert (other_position != draw(logits, **options).tokens).any()


@pytest.mark.parametrize("V", [97, 1000])
def test_penalties_are_openais_and_ctrls(V: int):
    """Presence and frequency count the output, repetition the prompt as well."""
    R, rng = 6, np.random.default_rng(1)
    logits = normal(R, V)
    history = rng.integers(0, V, (R, CONTEXT))
    history[:, 3] = logits.argmax(-1)
    history[:, 12:16] = history[:, [3]]  # some repeat themselves, and the prompt
    lengths, prompt_lens = np.array([16, 16, 16, 5, 16, 20]), np.array([8, 8, 8, 5, 16, 1])
    options: dict[str, Any] = {
        "repetition": np.array([1.0, 1.5, 0.7, 2.0, 1.3, 1.0]),
        "presence": np.array([0.0, 0.0, 1.1, 2.0, 0.5, -1.0]),
        "frequency": np.array([0.0, 0.0, 0.9, 2.0, 0.5, -0.6]),
    }
    want = logits.astype(np.float64)
    for r in range(R):
        known, output = history[r, : lengths[r]], history[r, prompt_lens[r] : lengths[r]]
        for t in np.unique(known):
            factor = options["repetition"][r]
            want[r, t] = want[r, t] / factor if want[r, t] > 0 else want[r, t] * factor
        counts = np.bincount(output, minlength=V)
        want[r] -= options["frequency"][r] * counts + options["presence"][r] * (counts > 0)
    shared = {"lengths": lengths, "prompt_lens": prompt_lens, **options}
    tokens = draw(logits, history, temperature=0.0, **shared).tokens
    assert tokens.tolist() == want.argmax(-1).tolist()
    assert tokens[1] != logits[1].argmax(), "what it leads with is penalised"
    drawn = draw(logits, history, **shared).tokens
    x = inputs(R, V, **shared)
    numbers = np.asarray(_uniform(jnp.asarray(x.seeds), jnp.asarray(x.lengths)))
    for row, token, u in zip(want, drawn, numbers, strict=True):
        assert_drawn(kept(row), float(u), int(token))


def test_a_row_reads_the_history_of_its_slot():
    logits = np.tile(np.array([3.0, 2.0, 1.0], np.float32), (2, 1))
    history = np.array([[0] * CONTEXT, [1] * CONTEXT, [2] * CONTEXT])
    tokens = draw(logits, history, temperature=0.0, presence=2.0, slots=[2, 0]).tokens
    assert tokens.tolist() == [0, 1]


def test_bias_comes_before_penalties():
    logits = np.array([[1.0, 0.5]], np.float32)
    history = np.zeros((1, CONTEXT))
    tokens = draw(logits, history, temperature=0.0, bias=[{0: 4.0}], repetition=20.0).tokens
    assert tokens.tolist() == [1]  # (1 + 4) / 20, and not 1 / 20 + 4


@pytest.mark.parametrize("V", [2, 12])
def test_bias_moves_scores(V: int):
    logits = normal(3, V)
    forced = draw(logits, temperature=0.0, bias=[{V - 1: 100.0}, {}, {0: -100.0, V - 1: -100.0}])
    want = logits.copy()
    want[0, V - 1] += 100
    want[2, [0, V - 1]] -= 100
    assert forced.tokens.tolist() == want.argmax(-1).tolist()
    p = kept(logits[1] + np.eye(V, dtype=np.float32)[1] * 2)
    seeds = np.arange(2000)
    many = draw(np.tile(logits[1], (2000, 1)), bias=[{1: 2.0}] * 2000, seeds=seeds).tokens
    share = (many == 1).mean()
    assert abs(share - p[1]) < 4 * (p[1] * (1 - p[1]) / 2000) ** 0.5 + 1e-3


@pytest.mark.parametrize("V", [1, 2, 97, 1000])
def test_a_mask_leaves_what_it_permits(V: int):
    R = 12
    logits = normal(R, V, scale=10)
    allowed = np.random.default_rng(V).random((R, V)) < 0.1
    allowed[:4, : V // 2] = False
    allowed[np.arange(R), np.arange(R) % V] = True
    for temperature in (0.0, 1.0, 100.0):
        tokens = draw(logits, temperature=temperature, mask=allowed).tokens
        assert allowed[np.arange(R), tokens].all()
    greedy = np.where(allowed, logits, -np.inf).argmax(-1)
    assert draw(logits, temperature=0.0, mask=allowed).tokens.tolist() == greedy.tolist()


@pytest.mark.parametrize("R", [1, 8])
@pytest.mark.parametrize("V", [1000, 32000])
def test_a_long_row_with_one_nan_has_no_finite_maximum(R: int, V: int):
    """XLA's maximum of a long row forgets it on CPU."""
    logits = np.random.default_rng(0).normal(size=(R, V)).astype(np.float32)
    logits[R // 2, V // 3] = np.nan
    _, best = jax.jit(argmax)(logits)
    assert np.isfinite(best).tolist() == [r != R // 2 for r in range(R)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 40, 96])
def test_a_row_that_is_not_finite_draws_nothing(temperature: float, bad: float, place: int):
    logits = normal(3, 97)
    clean = draw(logits, temperature=temperature).tokens
    logits[1, place] = bad
    tokens = draw(logits, temperature=temperature, top_p=0.9 if temperature else 1.0).tokens
    assert tokens[1] == -1
    if not temperature:
        assert tokens[[0, 2]].tolist() == clean[[0, 2]].tolist()


def test_scores_of_minus_infinity_are_never_drawn():
    logits = np.full((12, 97), -np.inf, np.float32)
    logits[:, [5, 90]] = 1.0
    tokens = draw(logits).tokens
    assert set(tokens) == {5, 90}


def test_a_drawn_token_is_remembered_where_the_next_step_looks():
    logits = normal(3, 97)
    history = np.full((4, CONTEXT), -1, np.int32)
    x = inputs(3, 97, slots=[2, 4, 0], lengths=[5, 6, 7])  # slot 4 does not exist: padding
    sampled, after = run(jnp.asarray(logits), jnp.asarray(history), x)
    want = history.copy()
    want[2, 5], want[0, 7] = sampled.tokens[0], sampled.tokens[2]
    np.testing.assert_array_equal(after, want)


@pytest.mark.parametrize("V", VOCABS)
def test_logprobs_are_the_models_own(V: int):
    """Before bias, mask and temperature; the rank counts the tokens that are more likely."""
    logits = normal(4, V)
    tokens = np.random.default_rng(2).integers(0, V, 4).astype(np.int32)
    logprob, rank, top_ids, top = map(np.asarray, jax.jit(logprobs_of)(logits, tokens))
    exact = logits.astype(np.float64)
    want = exact - np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True))
    want -= exact.max(-1, keepdims=True)
    n = min(20, V)
    for r, token in enumerate(tokens):
        assert logprob[r] == pytest.approx(want[r, token], abs=1e-4)
        assert rank[r] == 1 + (logits[r] > logits[r, token]).sum()
        assert top_ids[r, :n].tolist() == np.argsort(-logits[r], kind="stable")[:n].tolist()
        np.testing.assert_allclose(top[r, :n], want[r, top_ids[r, :n]], atol=1e-4)
        assert (top[r, n:] == -np.inf).all()


def test_reported_logprobs_ignore_what_changes_the_scores():
    logits = normal(3, 97)
    plain = draw(logits, temperature=0.0, logprobs=True)
    allowed = np.zeros((3, 97), bool)
    allowed[:, 42] = True
    bent = draw(logits, temperature=7.0, mask=allowed, bias=[{42: 5.0}] * 3, logprobs=True)
    assert bent.tokens.tolist() == [42] * 3
    np.testing.assert_array_equal(bent.top_logprobs, plain.top_logprobs)
    total = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(bent.logprob, logits[:, 42] - total, atol=1e-5)


@pytest.mark.parametrize("V", VOCABS)
def test_what_a_search_is_told_of_a_token(V: int):
    """Log-probability, entropy, margin and mean surprise of the likeliest k, against float64."""
    logits, k = normal(4, V), min(3, V)
    sampled = draw(logits, confidence_k=k)
    exact = logits.astype(np.float64)
    logprobs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    ranked = -np.sort(-logprobs, -1)
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
    margin = ranked[:, 0] - ranked[:, min(1, V - 1)]
    own = logprobs[np.arange(4), sampled.tokens]
    want = np.stack([own, entropy, margin, -ranked[:, :k].mean(-1)], -1)
    np.testing.assert_allclose(sampled.stats, want, atol=2e-4)


def test_nobody_is_told_what_nobody_asked_for():
    assert not draw(normal(3, 97)).stats.any()
