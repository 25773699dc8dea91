"""The kernel benchmark: floors, wrong results, tuned tables, and a whole small run."""

import json
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernels
from benchmarks.alternatives import alternatives
from benchmarks.entrants import XLA, Field, candidates, check
from benchmarks.floors import Rates, Sizes, measure
from benchmarks.kernels import Bench, Settings, device_named, summary
from benchmarks.order import GOALS, bodies_on, chosen, goals_first, in_turns, wanted
from benchmarks.programs import (
    Program,
    agreement,
    compiled_over,
    fits_cache,
    input_sets,
    set_count,
)
from benchmarks.stopwatch import Launch, race
from kernels_pallas import tuning
from kernels_pallas.flash_attention import flash_attention, flash_attention_gradient
from kernels_pallas.flash_attention.cases import _case as flash_case
from kernels_pallas.op import Body, Case, Cost, Op, UnsupportedError, tried
from kernels_pallas.paged_attention.attention_cases import case as page_case
from kernels_pallas.paged_attention.attention_cases import quantized_case
from kernels_pallas.paged_attention.ops import page_attention
from kernels_pallas.registry import OPS
from kernels_pallas.target import Target
from tests.sparing import sparing

RATES = Rates(copy=1e9, read=2e9, matmul={"float32": 1e12, "int8": 4e12})
QUICK = Settings(seconds=0.01, most_floor=1.0, shipped=False, torch=False)


@dataclass(frozen=True)
class Tile:
    rows: int = tried(8, 16)


def reference(x: jax.Array, *, off: float = 0.0) -> jax.Array:
    return 2 * x


def body(error: float, *, slow: int = 0, refuses: bool = False) -> Body:
    def run(x, *, off=0.0, tile=None, interpret=False):
        if refuses:
            raise UnsupportedError("not today")
        y = 2 * x + error * (1 if tile is None or tile.rows == 8 else 0)
        for _ in range(slow):
            y = jnp.sin(y) * 0 + y
        return y

    return Body("cpu", run, Tile)


def case(shape=(64, 64), **options) -> Case:
    def make(key):
        return (jax.random.normal(key, shape),), {}

    return Case("case", make, options, True, Cost(8 * 64 * 64, 64.0, "float32"))


def op(**bodies: Body) -> Op:
    return Op("double", reference, bodies, (case(),))


def bench(settings: Settings = QUICK) -> Bench:
    return Bench(jax.devices("cpu")[0], RATES, settings)


@pytest.fixture(autouse=True)
def _default_device():
    yield
    jax.config.update("jax_default_device", None)


def by_name(lines):
    return {line["contestant"]: line for line in lines}


def test_a_floor_is_the_slower_of_moving_and_multiplying():
    memory = RATES.floor(Cost(bytes=4e6, flops=1e9, dtype="int8"))
    assert (memory.bytes, memory.flops) == (pytest.approx(2e-3), pytest.approx(0.25e-3))
    assert (memory.seconds, memory.bound) == (memory.bytes, "memory")
    products = RATES.floor(Cost(bytes=4e6, flops=1e11, dtype="int8"))
    assert (products.seconds, products.bound) == (pytest.approx(0.025), "arithmetic")
    assert RATES.floor(Cost(1, 1e12, "uint16")).flops == pytest.approx(1), "as float32"


def test_rates_are_measured():
    rates = measure(jax.devices("cpu")[0], Sizes.of("cpu", smoke=True), seconds=0.02)
    assert set(rates.matmul) == {"bfloat16", "int8", "float32"}
    assert min(rates.copy, rates.read, *rates.matmul.values()) > 1e6


@pytest.mark.parametrize(
    ("ops", "cases", "message"),
    [
        (["linear", "foo"], [], "no op is called foo; there are .*page_attention"),
        (["page_attention"], ["zzz"], "contains zzz; there are .*decode-32k"),
    ],
)
def test_names_that_nothing_has_are_answered_with_those_there_are(ops, cases, message):
    with pytest.raises(ValueError, match=message):
        wanted(ops, cases, shipped=True)


def test_a_device_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(SystemExit, match="--device xyz: JAX finds none of that name, but cpu"):
        device_named("xyz")


def test_what_is_wrong_or_refused_is_said_and_never_timed():
    lines = by_name(
        bench().case(op(right=body(0.0), wrong=body(1.0), refusing=body(0.0, refuses=True)), case())
    )
    assert lines["right"]["correct"] and lines["right"]["ms"] > 0
    assert "off by" in lines["wrong"]["wrong"]
    assert "not today" in lines["refusing"]["failed"]
    assert "ms" not in lines["wrong"] and "ms" not in lines["refusing"]


def test_a_record_says_floor_share_and_ratio():
    line = by_name(bench().case(op(right=body(0.0)), case()))["right"]
    assert line["floor_ms"] == {"bytes": pytest.approx(0.01638, rel=1e-3), "flops": 6.4e-8}
    assert line["bound"] == "memory"
    assert line["share_of_floor"] == pytest.approx(line["floor_ms"]["bytes"] / line["ms"], rel=0.05)
    assert line["quartiles"][0] <= line["ms"] <= line["quartiles"][1]
    assert 0 < line["host_ms"] <= line["ms"] and line["from_cache"]
    assert line["ratio_to_best_alternative"] > 0


def test_cases_too_large_or_too_late_are_skipped_and_said_to_be():
    [line] = bench(Settings(most_floor=1e-6)).case(op(right=body(0.0)), case())
    assert "its floor is" in line["skipped"]
    [line] = bench(Settings(budget=-1)).case(op(right=body(0.0)), case())
    assert "are over" in line["skipped"]


def test_tuning_keeps_the_fastest_correct_one_and_the_chooser_obeys(tmp_path, monkeypatch):
    """The default is wrong with 8 rows, and slow; XLA's own form is taken where it is faster."""
    settings = Settings(seconds=0.05, most_floor=1.0, tiles=4, torch=False)
    tunable = op(only16=body(1.0))
    found = bench(settings)
    lines = by_name(found.case(tunable, case()))
    assert "wrong" in lines["only16"] and lines["only16 rows=16"]["correct"]
    [(signature, entry)] = found.won["double"].items()
    assert signature == "float32[64,64]"
    times = {name: line["ms"] for name, line in lines.items() if "ms" in line}
    winner = min(times, key=times.get)
    assert entry["implementation"] == lines[winner]["contestant"].split()[0].replace("xla", XLA)
    assert entry["source"] == "measured" and entry["ms"].keys() == times.keys()

    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    entry = tuning.entry("only16", Tile(16), source="measured")
    tuning.merge(tmp_path / "zen5.json", {"double": {signature: entry}})
    x = jnp.ones((64, 64))
    assert tunable(x, target=Target("cpu", "zen5"))[0, 0] == 2.0
    assert tunable(x, target=Target("cpu", ""))[0, 0] == 3.0, "the wrong default"


def test_a_compiled_entry_never_replaces_a_measured_one(tmp_path):
    path = tmp_path / "v6e.json"
    measured = tuning.entry("a", Tile(16), source="measured")
    tuning.merge(path, {"op": {"s": measured}})
    tuning.merge(path, {"op": {s: tuning.entry("b", None, source="compiled") for s in "st"}})
    table = json.loads(path.read_text())["op"]
    assert table["s"] == measured and table["t"]["implementation"] == "b"


def test_what_is_fast_but_behind_is_listed():
    line = {"op": "o", "case": "c"}
    records = [
        line | {"contestant": "b", "kind": "body", "ms": 2.0},
        line | {"contestant": "xla", "kind": "xla", "ms": 3.0},
        line | {"contestant": "other", "kind": "library", "ms": 1.0},
        line | {"contestant": "bad", "kind": "body", "wrong": "off"},
    ]
    found = summary(records)
    assert found["behind_xla"] == [] and found["wrong"] == ["o c bad"]
    assert found["behind_an_alternative"] == ["o c: 2 against 1 ms"]


def test_a_run_that_ends_early_has_met_all_ops():
    ops = {"a": 3, "b": 1, "c": 2}
    work = [(Op(o, reference, {}, ()), case()) for o, count in ops.items() for _ in range(count)]
    assert "".join(op.name for op, _ in in_turns(work)) == "abcaca"


def test_what_a_card_is_asked_first_exists_and_comes_first():
    work = in_turns(list(chosen([], [], shipped=True)))
    first = goals_first(work)
    assert [(op.name, case.name) for op, case in first[: len(GOALS)]] == list(GOALS)
    assert len(first) == len(work)
    assert all(bodies_on(op, case, "gpu") for op, case in first[: len(GOALS)])


def test_what_has_no_body_there_is_not_run():
    named = Case("other", case().make, cost=Cost(1), bodies=("other",))
    for each in (op(), op(right=Body("tpu", lambda x: x, Tile))):
        [line] = bench().case(each, case())
        assert line["skipped"] == "no body for cpu"
    [line] = bench().case(op(right=body(0.0)), named)
    assert line["skipped"] == "no body for cpu"


def test_programs_are_compiled_ahead_and_used():
    """Bodies are traced while nothing is timed, and not again; what refuses says so in its turn."""
    traces = list[str]()

    def run(x, *, off=0.0, tile=None, interpret=False):
        traces.append("body")
        return 2 * x

    found, done = bench(), list[int]()
    double = op(traced=Body("cpu", run, Tile), refusing=body(0.0, refuses=True))
    found.compile([(double, case())], lambda: done.append(len(traces)))
    assert traces and len(done) == 5, "inputs, the truth, XLA and two bodies"
    traces.clear()
    lines = by_name(found.case(double, case()))
    assert lines["traced"]["correct"] and not traces
    assert "not today" in lines["refusing"]["failed"]


def test_a_fatal_body_is_left_out_and_others_are_timed():
    found = bench()
    found.fatal = {("double", "case", "bad")}
    lines = by_name(found.case(op(right=body(0.0), bad=body(0.0)), case()))
    assert "fatal" in lines["bad"]["skipped"] and "ms" not in lines["bad"]
    assert lines["right"]["ms"] > 0 and lines["xla"]["ms"] > 0
    assert lines["right"]["best_alternative"] == "xla"
    found.fatal = {("double", "case", "")}
    lines = by_name(found.case(op(right=body(0.0)), case()))
    assert "fatal" in lines["right"]["skipped"] and lines["xla"]["ms"] > 0


def test_a_program_compiled_from_shapes_runs_on_arrays():
    def run(inputs):
        (total, x), _ = inputs
        return total + x, total

    sets = [((jnp.zeros(()), jnp.float32(10**i)), {}) for i in range(2)]
    shapes = jax.eval_shape(lambda: sets)
    compiled = compiled_over(run, shapes, True, ((0, 0),))
    (total,), [before] = Program(run, sets, True, ((0, 0),), compiled).first()
    assert (total, before) == (11, 0)


def test_contestants_take_turns():
    order = []

    def launch(name):
        return Launch(lambda: order.append(name) or time.sleep(0.001), lambda _: None)

    times = race({"a": launch("a"), "b": launch("b")}, seconds=0.0, least=4, batch=0.0)
    assert "".join(order) == "aabb" + "ab" * 4  # after two each that warm up
    assert {name: len(t.samples) for name, t in times.items()} == {"a": 4, "b": 4}


def test_a_record_tells_starting_from_waiting():
    starts = Launch(lambda: time.sleep(0.002), lambda _: None)
    waits = Launch(lambda: None, lambda _: time.sleep(0.002))
    times = race({"starts": starts, "waits": waits}, seconds=0.0, least=3, batch=0.0)
    assert 0.002 <= times["starts"].host <= times["starts"].median
    assert times["waits"].host < 0.001 < 0.002 <= times["waits"].median


def test_small_inputs_come_in_several_sets_and_large_ones_in_one():
    assert set_count(case(), "cpu", memory=1e9) == 16
    assert set_count(case(), "cpu", memory=40_000) == 2
    large = Case("l", case().make, {}, True, Cost(1e9))
    assert set_count(large, "gpu", memory=1e9) == 1
    assert fits_cache(case(), "cpu", 16) and not fits_cache(large, "gpu", 1)
    first, second = ([x for x, *_ in (args,)] for args, _ in input_sets(case(), 2))
    assert not jnp.array_equal(first[0], second[0]), "no two sets are alike"


@pytest.mark.parametrize("joined", [False, True])
def test_arguments_in_place_are_carried_and_others_take_turns(joined):
    def run(inputs):
        (total, x), _ = inputs
        return total + x, total

    sets = [((jnp.zeros(()), jnp.float32(10**i)), {}) for i in range(3)]
    program = Program(run, sets, joined, in_place=((0, 0),))
    (total,), [before] = program.first()
    assert (total, before) == ((111, 0) if joined else (1, 0))
    launch = program.launch()
    for _ in range(1 if joined else 3):
        (total,), _ = launch.start()
    assert total == 111 and launch.calls == (3 if joined else 1)
    assert sets[0][0][0] == 0, "the inputs are not consumed"


def test_agreement():
    x = jnp.array([1.0, -jnp.inf, 4.0])
    assert agreement(x, x, 0.0).right, "infinities are equal to themselves"
    assert agreement(x + jnp.array([0, 0, 0.1]), x, 0.03).right
    assert not agreement(x + jnp.array([0, 0, 0.1]), x, 0.02).right
    assert not agreement(x * jnp.nan, x, 1.0).right
    assert not agreement(x[:2], x, 1.0).right
    ids = jnp.arange(100)
    assert agreement(ids.at[0].set(7), ids, 0.0).right, "a near tie"
    assert not agreement(ids + 1, ids, 0.0).right


def test_candidates_are_drawn_from_what_tiles_declare():
    for each in OPS:
        for body in each.bodies.values():
            tiles = list(body.tiles("v5p"))
            assert len(set(tiles)) == len(tiles)
            wanted = body.wanted("v5p") or body.tile()
            assert not tiles or wanted in tiles, "what is tried begins with what a device wants"
            drawn = candidates(body, "v5p", 3)
            assert drawn == candidates(body, "v5p", 3) and len(drawn) == min(3, len(tiles))


SMALL = [(o, c) for o in OPS for c in o.cases if not c.shipped and o.name != "paged_attention"]
FIRST = [next(one for one in SMALL if one[0] is op) for op, _ in SMALL]
THREE, MIXED = ((1,) * 3, (64,) * 3), ((1, 20, 1), (64, 20, 64))
EVEN = [
    (page_attention, each)
    for each in (
        page_case("even", *THREE, N=4, K=2, H=128, Z=16),
        page_case("even-mixed", *MIXED, N=4, K=2, H=128, Z=16),
        page_case("even-mass", *THREE, N=4, K=2, H=128, Z=16, mass=True),
        page_case("even-latent", *THREE, N=16, K=1, H=192, Z=16, value_dim=128),
        quantized_case("even-int8", "int8", *MIXED, N=4, K=2, Z=32),
        quantized_case("even-static", "static", *THREE, N=4, K=2, Z=32),
        quantized_case("even-int4", "int4", *MIXED, N=4, K=2, Z=32),
        quantized_case("even-int8-latent", "int8", *THREE, N=16, K=1, H=192, value_dim=128, Z=32,
                   latent=(128, 128)),
        quantized_case("even-int4-latent", "int4", *THREE, N=16, K=1, H=288, value_dim=256, Z=32,
                   latent=(256, 128)),
    )
]  # fmt: skip
ONE_DOCUMENT = [
    (
        o,
        flash_case(
            "one", 2, 128, 2, 1, 64, one=True, backward=o is flash_attention_gradient, **more
        ),
    )
    for o in (flash_attention, flash_attention_gradient)
    for more in ({}, {"window": 40})
]


@pytest.mark.parametrize(
    ("each", "small"),
    [*sparing(SMALL, *FIRST), *sparing(EVEN, EVEN[3], EVEN[4]), *ONE_DOCUMENT],
    ids=lambda x: x.name,
)
def test_alternatives_compute_what_the_reference_does(each, small):
    """On small cases; torch's ways where torch is installed."""
    sets = [small.make(jax.random.key(0))]
    names = [way.name for way in alternatives(each, small, sets[0], "gpu")]
    if (each, small) in EVEN:  # of latent keys, of rounded ones and of prompts, too
        assert "torch_sdpa" in names and len(names) >= 2
    if not list(alternatives(each, small, sets[0], "cpu")):
        assert (each, small) in SMALL
        pytest.skip("nobody else computes this")
    field = Field(each, small, sets, "cpu")
    entrants = list(field.libraries(field.expected(), 1e9, torch=True))
    for checked in check(entrants):
        assert checked.launch, f"{checked.entrant.name}: {checked.problem}"


@pytest.mark.slow
def test_a_whole_run_on_cpu_writes_valid_json(tmp_path):
    work = list(chosen(["linear", "rms_norm"], [], shipped=False))
    out = tmp_path / "r.json"
    settings = Settings(seconds=0.01, most_floor=1.0, tiles=2, torch=False)
    kernels.run(
        jax.devices("cpu")[0], settings, work, out, sizes=Sizes.of("cpu", smoke=True),
        tables=tmp_path,
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert {
        "device",
        "versions",
        "rates",
        "rates_after",
        "host",
        "seconds",
        "summary",
        "records",
    } <= set(report)
    assert {(r["op"], r["case"]) for r in report["records"]} == {(o.name, c.name) for o, c in work}
    timed = [r for r in report["records"] if "ms" in r]
    assert {r["kind"] for r in timed} == {"xla", "body"} and report["summary"]["wrong"] == []
    [table] = [path for path in tmp_path.iterdir() if path != out]
    found = json.loads(table.read_text())
    entries = [entry for signatures in found.values() for entry in signatures.values()]
    assert len(entries) == len(work)
    assert all(e["implementation"] in ("native", XLA) for e in entries)
