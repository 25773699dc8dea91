"""The search keeps to memory and latency, and says why what lost has lost."""

import pytest

from jaxserve.deployment import memory, search, shapes
from jaxserve.deployment.prediction import Traffic
from jaxserve.deployment.search import Wish
from jaxserve.errors import ConfigError
from sharding.hardware import named
from sharding.mesh import Parallelism

QWEN, LLAMA = shapes.read("qwen3-30b-a3b"), shapes.read("llama-3.1-8b")
DEEPSEEK = shapes.read("deepseek-r1")
TPUS = named("v5e:4x4")


def plan(shape, topology, prompt=1024, **wish):
    return search.plan(shape, topology, Traffic(prompt, 256), Wish(**wish))


@pytest.mark.parametrize("shape", [QWEN, LLAMA], ids=lambda s: s.name)
def test_a_plan_fits_and_is_in_time(shape):
    found = plan(shape, TPUS, tpot=0.03, ttft=1.0)
    for decode in (found.decode, found.runner_up):
        assert decode.tpot <= 0.03
        assert decode.memory.total <= memory.limit(TPUS)
        assert decode.split.num_devices == 16
    assert found.prefill.ttft <= 1.0
    assert found.prefill.memory.total <= memory.limit(TPUS)
    assert found.decode.rate >= found.runner_up.rate


def test_one_more_sequence_would_break_a_limit():
    found = plan(LLAMA, TPUS, tpot=0.03)
    with pytest.raises(ConfigError, match="nearest"):
        plan(LLAMA, TPUS, tpot=0.03, batch=found.batch + 1, tensor=found.decode.split.tensor)
    same = plan(LLAMA, TPUS, tpot=0.03, batch=found.batch, tensor=found.decode.split.tensor)
    assert same.decode.split == found.decode.split


def test_a_looser_limit_serves_no_less():
    rates = [plan(QWEN, TPUS, tpot=t).decode.rate for t in (0.02, 0.03, 0.06, None)]
    assert rates == sorted(rates)


def test_the_runner_up_has_a_reason_with_numbers():
    found = plan(QWEN, TPUS, tpot=0.03)
    assert search.options(found.runner_up.split) in found.why
    assert "% fewer" in found.why
    assert "µs of a step for each sequence" in found.why


def test_what_is_fixed_is_kept():
    found = plan(QWEN, TPUS, expert=16, tensor=2, batch=4)
    assert found.decode.split == Parallelism(data=8, expert=16, tensor=2)
    assert found.batch == 4


def test_a_batch_counts_npus_on_ascend():
    found = plan(DEEPSEEK, named("cm384-decode"), 4096, batch=96, expert=320, tensor=1)
    assert found.decode.sequences == 48
    assert found.batch == 96


def test_a_published_instance_has_its_own_split():
    """At its own batch; the search may like another better, and says so."""
    instance = named("cm384-decode")
    found = plan(DEEPSEEK, instance, 4096, batch=96, tpot=0.05)
    assert found.decode.split == Parallelism(data=320, expert=320)
    assert "not the split that was published" in found.why
    late = plan(DEEPSEEK, instance, 4096, batch=8, tpot=0.015)
    assert late.decode.split == Parallelism(data=320, expert=320)
    assert not late.in_time
    assert plan(DEEPSEEK, instance, 4096, batch=96, tensor=2).decode.split.tensor == 2


@pytest.mark.parametrize(
    ("shape", "wish", "message"),
    [
        (LLAMA, {"tensor": 3}, r"data=5 x tensor=3 are 15 devices, and there are 16; the nearest"),
        (LLAMA, {"expert": 4}, r"no experts to split over expert=4; the nearest .* --ep 1"),
        (QWEN, {"expert": 5}, r"expert=5 must be 1, or a multiple .*the nearest .* --ep 4"),
        (QWEN, {"data": 7}, r"data=7 x tensor=2 are 14 devices, and there are 16; .*--dp 8"),
        (DEEPSEEK, {}, r"at least [\d.]+ GB a device are needed .* take one about [\d.]+ times"),
        (LLAMA, {"tpot": 1e-4}, r"within 0\.1 ms; the nearest takes [\d.]+ ms with --dp"),
        (LLAMA, {"batch": 5000}, r"GB a device are needed .*works is --batch \d+ --dp"),
        (LLAMA, {"ttft": 1e-4}, r"no instance answers within 0 ms; the nearest takes \d+ ms"),
    ],
)
def test_what_cannot_work_is_told_the_nearest_that_does(shape, wish, message):
    with pytest.raises(ConfigError, match=message):
        plan(shape, TPUS, **wish)


def test_an_odd_batch_of_an_npu_is_refused_where_dies_do_not_share_it():
    with pytest.raises(ConfigError, match=r"97 is not divided by the 2 devices.*--batch 96"):
        plan(DEEPSEEK, named("cm384-decode"), 4096, batch=97, tensor=1)


def test_the_nearest_batch_works():
    with pytest.raises(ConfigError) as refused:
        plan(LLAMA, TPUS, batch=5000)
    words = str(refused.value).split()
    batch, tensor = (int(words[words.index(o) + 1]) for o in ("--batch", "--tp"))
    assert plan(LLAMA, TPUS, batch=batch, tensor=tensor).batch == batch


def test_lengths_past_the_models_positions_are_refused():
    with pytest.raises(ConfigError, match=r"positions for 131072 tokens.*shorten one of them by 1"):
        plan(LLAMA, TPUS, 131072 - 256 + 1)


def test_hardware_of_unknown_speed_is_refused():
    with pytest.raises(ConfigError, match="bf16, hbm_gb, hbm_gbps of CPU are not known"):
        plan(LLAMA, named("cpu:4"))
