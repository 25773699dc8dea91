"""`jaxserve plan`: what it prints, what it refuses, and how soon it answers."""

import json

import pytest

from jaxserve.cli import main, parser
from jaxserve.cli.plan import find
from jaxserve.deployment.search import SPREAD_BATCHES
from sharding.description import dump
from sharding.hardware import named
from sharding.mesh import Parallelism

PAPER = ["plan", "deepseek-r1", "--topology", "cm384-decode", "--prompt-len", "4096"]
KEYS = {
    "model", "topology", "parallelism", "batch", "prompt_len", "output_len",
    "memory_per_device_gb", "ttft_ms", "tpot_ms", "tokens_per_s_per_device",
    "decode_tokens_per_s_per_npu", "prefill_tokens_per_s_per_npu", "binding", "runner_up",
}  # fmt: skip


def plan_json(capsys, *args):
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_papers_deployment_as_json(capsys):
    found = plan_json(capsys, *PAPER, "--output-len", "256", "--batch", "96", "--slo-tpot", "50ms")
    assert found.keys() >= KEYS
    assert found["decode_tokens_per_s_per_npu"] == pytest.approx(1943, rel=0.10)
    assert found["prefill_tokens_per_s_per_npu"] == pytest.approx(5655, rel=0.10)
    assert found["decode_tokens_per_s_per_npu"] == pytest.approx(
        2 * found["tokens_per_s_per_device"], rel=1e-3
    )
    assert found["tpot_ms"] == pytest.approx(49.4, rel=0.10)
    assert found["parallelism"] == {"data": 320, "expert": 320, "tensor": 1, "sequence": 1}
    assert (found["batch"], found["prompt_len"], found["output_len"]) == (96, 4096, 256)
    assert found["runner_up"]["why"]


def test_perfect_placement_reads_faster(capsys):
    asked = [*PAPER, "--batch", "96", "--ep", "320", "--tp", "1"]
    found = plan_json(capsys, *asked, "--perfect-eplb")
    assert found["prefill_tokens_per_s_per_npu"] == pytest.approx(6688, rel=0.10)


def test_drafts_and_microbatches_can_be_left_out(capsys):
    asked = [*PAPER, "--batch", "96", "--ep", "320", "--tp", "1"]
    with_both = plan_json(capsys, *asked)
    plain = plan_json(capsys, *asked, "--no-mtp", "--no-microbatch")
    assert (with_both["tokens_per_step"], plain["tokens_per_step"]) == (1.7, 1)
    assert (with_both["microbatches"], plain["microbatches"]) == (2, 1)
    assert plain["memory_gb"]["draft"] == 0 < with_both["memory_gb"]["draft"]


def test_weights_can_be_kept_in_sixteen_bits(capsys):
    asked = ["plan", "llama-3.1-8b", "--topology", "v5e:2x2", "--batch", "4", "--tp", "4"]
    eight, sixteen = plan_json(capsys, *asked), plan_json(capsys, *asked, "--bf16")
    assert (eight["weights"], sixteen["weights"]) == ("int8", "bfloat16")
    assert sixteen["memory_gb"]["layers"] == pytest.approx(
        2 * eight["memory_gb"]["layers"], rel=1e-3
    )
    assert sixteen["tpot_ms"] > eight["tpot_ms"]


def test_a_table_for_people(capsys):
    asked = ["--topology", "h200:1x1x8", "--slo-tpot", "50ms", "--slo-ttft", "1.5s"]
    assert main(["plan", "llama-3.1-8b", *asked]) == 0
    text = capsys.readouterr().out
    for part in ("split", "memory", "first token", "per token", "binding", "runner-up: --dp"):
        assert part in text


def test_hardware_may_be_a_file(capsys, tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(dump(named("v5e:2x2")))
    asked = ["plan", "llama-3.1-8b", "--batch", "8", "--topology"]
    from_file = plan_json(capsys, *asked, str(path))
    assert from_file == plan_json(capsys, *asked, "v5e:2x2")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["qwen3-8b", "--topology", "v5x:2x2"], "the nearest is 'v5p:4x4x20'"),
        (["qwen3-8b", "--topology", "v5p:3x3x3"], "the nearest is"),
        (["qwen3-8b", "--topology", "/no/lab.toml"], "there is no such file"),
        (["qwen4", "--topology", "v5e:2x2"], "the nearest is 'qwen3-8b'"),
        (["qwen3-8b", "--topology", "v5e:2x2", "--batch", "0"], "--batch 0 must be at least 1"),
        (["deepseek-r1", "--topology", "v5e:4x4"], "GB a device are needed"),
        (["qwen3-8b", "--topology", "v5e:2x2", "--tp", "3"], "the nearest that works is"),
    ],
)
def test_bad_input_is_one_line_with_the_nearest_choice(capsys, args, message):
    assert main(["plan", *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["50", "0ms", "fast", "-5ms"])
def test_a_time_has_a_unit(capsys, text):
    with pytest.raises(SystemExit):
        parser().parse_args(["plan", "m", "--topology", "cm384", f"--slo-tpot={text}"])
    assert "is no time above 0, such as 50ms or 2s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "target", "experts"),
    [
        ("deepseek-r1", "v5p:4x4x20", 320),
        ("qwen3-235b-a22b", "v6e:16x16", 256),
        ("qwen3-30b-a3b", "v6e:8x8", 64),
    ],
)
def test_what_is_compiled_spreads_experts_over_the_slice(model: str, target: str, experts: int):
    found = find(parser().parse_args(["plan", model, "--compile", target]))
    assert found.decode.split == Parallelism(experts, experts, 1)
    assert found.decode.sequences in SPREAD_BATCHES
