"""The cost model's sense: more hardware is never slower, more work never faster."""

import dataclasses
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.deployment import cost, operators, prediction, shapes
from jaxserve.deployment.operators import Model, Placement, Work
from jaxserve.deployment.prediction import Traffic
from sharding.hardware import named
from sharding.mesh import Parallelism

CASES = {
    "deepseek-r1": ("cm384-decode", Parallelism(data=320, expert=320)),
    "qwen3-30b-a3b": ("v5p:4x4x4", Parallelism(data=16, expert=64, tensor=4)),
    "qwen3-8b": ("h200:1x1x8", Parallelism(data=4, tensor=2)),
}
models = st.sampled_from(sorted(CASES))
batches = st.integers(1, 200)
lengths = st.integers(1, 30_000)


@cache
def case(name):
    topology, split = CASES[name]
    return shapes.read(name), named(topology), split


def decode(name, batch, prompt, topology=None, **traffic):
    shape, usual, split = case(name)
    asked = Traffic(prompt, 128, **traffic)
    return prediction.decode(shape, topology or usual, split, asked, batch)


def faster(topology, factor):
    """Every rate of the machine is so many times as high."""
    chip = topology.chip
    rates = {k: factor * v for k in ("bf16", "int8", "fp8", "hbm_gbps") if (v := getattr(chip, k))}
    fabrics = tuple(
        dataclasses.replace(
            f,
            gbps=f.gbps * factor,
            measured_gbps=f.measured_gbps and f.measured_gbps * factor,
        )
        for f in topology.fabrics
    )
    return dataclasses.replace(topology, chip=dataclasses.replace(chip, **rates), fabrics=fabrics)


@given(models, batches, lengths, st.floats(1, 10))
def test_a_faster_machine_is_no_slower(name, batch, prompt, factor):
    quick = decode(name, batch, prompt, faster(case(name)[1], factor))
    assert quick.tpot <= decode(name, batch, prompt).tpot * (1 + 1e-9)


@given(models, batches, lengths, st.sampled_from(["bf16", "int8", "hbm_gbps"]))
def test_no_single_rate_makes_it_slower(name, batch, prompt, rate):
    topology = case(name)[1]
    chip = dataclasses.replace(topology.chip, **{rate: 2 * getattr(topology.chip, rate)})
    quick = decode(name, batch, prompt, dataclasses.replace(topology, chip=chip))
    assert quick.tpot <= decode(name, batch, prompt).tpot * (1 + 1e-9)


@given(models, batches, lengths, st.integers(1, 100))
def test_more_sequences_take_more_of_everything(name, batch, prompt, more):
    few, many = decode(name, batch, prompt), decode(name, batch + more, prompt)
    assert many.memory.total > few.memory.total
    assert many.tpot >= few.tpot * (1 - 1e-9)


@given(models, batches, lengths, st.integers(1, 10_000))
def test_longer_prompts_take_longer_and_more(name, batch, prompt, more):
    short, long = decode(name, batch, prompt), decode(name, batch, prompt + more)
    assert long.memory.cache > short.memory.cache
    assert long.tpot >= short.tpot * (1 - 1e-9)


@given(models, batches, lengths)
def test_two_microbatches_are_taken_where_they_pay(name, batch, prompt):
    either, one = decode(name, batch, prompt), decode(name, batch, prompt, microbatch=False)
    assert one.layers.microbatches == 1
    assert either.seconds <= one.seconds


@given(batches, lengths)
def test_the_best_division_of_cores_is_found(batch, prompt):
    shape, topology, split = case("deepseek-r1")
    half = Work(batch / 2, 2, prompt, decode=True)
    layers = operators.step(Model(shape, split, eight_bit=True), half)
    every = [
        sum(2 * x.count * cost._pair(x, topology, c / 24) for x in layers) for c in range(1, 24)
    ]
    assert cost.divided(layers, topology).seconds == pytest.approx(min(every), rel=1e-12)


def test_what_waits_adds_up_to_a_serial_step():
    found = decode("deepseek-r1", 4, 4096)
    assert found.layers.microbatches == 1
    assert sum(found.waits.values()) == pytest.approx(found.seconds)


def test_sequence_parallel_attention_moves_what_the_paper_counts():
    """§7: 1.07 GB gathered and 260 MB sent by a die with 8,192 tokens, two collectives a layer."""
    shape = shapes.read("deepseek-r1")
    split = Parallelism(expert=32, tensor=32, sequence=32)
    work = Work(64, 4096, 0, decode=False)
    dense, _ = operators.step(Model(shape, split, eight_bit=True), work)
    gather, exchange = [op.collective for op in dense.attention if op.collective]
    assert (gather.kind, exchange.kind) == ("all_gather", "all_to_all")
    assert gather.num_bytes * 31 / 32 == pytest.approx(1.07e9, rel=0.01)
    assert exchange.num_bytes * 31 / 32 == pytest.approx(260e6, rel=0.01)


def test_splitting_heads_divides_the_work():
    shape = shapes.read("qwen3-8b")
    work = Work(16, 1, 1000, decode=True)
    (one,) = operators.step(Model(shape, Parallelism(), True), work)
    (two,) = operators.step(Model(shape, Parallelism(tensor=2), True), work)
    for whole, half in zip(
        [op for op in one.operators if op.flops],
        [op for op in two.operators if op.flops],
        strict=True,
    ):
        assert half.flops == whole.flops / 2
        assert half.weights + half.cache == (whole.weights + whole.cache) / 2
    sums = [op.collective.kind for op in two.operators if op.collective]
    assert sums == ["all_reduce", "all_reduce"]


@pytest.mark.parametrize(
    ("expert", "placement"),
    [
        (320, Placement(288, 1, 32)),  # §3
        (32, Placement(32, 9)),  # §2: and a shared one on each
        (256, Placement(256, 1)),
        (1, Placement(1, 256)),
    ],
)
def test_experts_are_placed_as_in_the_paper(expert, placement):
    split = Parallelism(data=max(expert, 1), expert=expert)
    assert Placement.of(shapes.read("deepseek-r1"), split) == placement


def test_worst_case_buffers_are_as_the_paper_counts():
    """§3: 225 MB and 420 MB for 96 rows of 320 ranks."""
    found = decode("deepseek-r1", 48, 4096)
    assert found.memory.buffers == 320 * 96 * (7168 + 512 + 14336)


def test_windows_bound_what_is_read():
    work = Work(1, 1, 10_000, decode=True)
    assert (work.seen(0), work.seen(512)) == (10_000, 512)
    prompt = Work(1, 1000, 0, decode=False)
    assert prompt.seen(0) == 500  # the causal half
    assert prompt.seen(100) == pytest.approx(95)
