"""The command line: quick to answer, honest about failures, and the same engine underneath."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from jaxserve import plan
from jaxserve.checkpoint import cache_scales
from jaxserve.cli import bench, chat, doctor, generate, main, parser
from jaxserve.cli import options as cli_options
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.quant import weights
from jaxserve.testing import write_checkpoint
from tests.jaxserve.server.fake_llm import FakeLLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", "qwen3"))


@pytest.fixture
def fake(monkeypatch):
    llm = FakeLLM()
    for module in (generate, chat, bench):
        monkeypatch.setattr(module, "load", lambda args: llm)
    monkeypatch.setattr(bench, "_context", lambda args: llm.max_model_len)
    return llm


def command(*args, **kwargs):
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, **kwargs
    )


def test_help_needs_neither_jax_nor_a_server():
    code = (
        "import sys; from jaxserve.cli import parser; parser().format_help(); "
        "print(*{'jax', 'numpy', 'rich', 'starlette', 'uvicorn'} & set(sys.modules))"
    )
    done = command("-c", code)
    assert (done.returncode, done.stdout.split()) == (0, [])
    listed = command("-m", "jaxserve.cli", "--help").stdout
    assert all(name in listed for name in ("serve", "generate", "chat", "bench", "doctor"))


def test_every_engine_setting_is_an_option_and_described():
    described = cli_options.describe(EngineConfig)
    args = parser().parse_args(["serve", "m"])
    assert cli_options.engine_settings(args) == dataclasses.asdict(EngineConfig()) | {
        "revision": None
    }
    assert all(described[field.name] for field in dataclasses.fields(EngineConfig))
    args = parser().parse_args(
        ["bench", "m", "--max-model-len", "64", "--no-progress", "--kernels", "reference"]
    )
    settings = cli_options.engine_settings(args)
    assert (settings["max_model_len"], settings["progress"]) == (64, False)
    assert settings["kernels"] == "reference"


def test_an_empty_default_is_not_shown(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    shown = capsys.readouterr().out
    assert "rules for the model\n" in shown and "(default: )" not in shown


def test_a_choice_that_may_be_left_out_can_be_made(capsys):
    args = parser().parse_args(["generate", "m", "p", "--quantization", "int8"])
    assert EngineConfig(**{k: v for k, v in cli_options.engine_settings(args).items()
                           if k != "revision"}).quantization == "int8"  # fmt: skip


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ("--quantization int3", "or what the checkpoint is stored in (compressed-tensors"),
        ("--kv-cache-dtype fp8", "int8 is as small as float8"),
        ("--gpu-memory-utilization 0.5", "here it is memory_utilization"),
        ("--block-size 16", "here it is page_size"),
        ("--enforce-eager", "leave it out"),
        ("--trust-remote-code", "code of checkpoints never runs"),
    ],
)
def test_a_choice_that_is_none_and_names_of_vllm_are_answered_in_a_line(options, remedy, capsys):
    for command, *model in (["generate", "m", "p"], ["doctor", "models/recall-dense"]):
        assert main([command, *options.split(), *model]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and remedy in said


def test_an_error_is_one_line_and_no_traceback(capsys):
    assert main(["generate", "/no/such/folder", "hi"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: /no/such/folder is no folder here\n"


def test_verbose_shows_the_traceback():
    done = command("-m", "jaxserve.cli", "generate", "/no/such/folder", "hi", "--verbose")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "CheckpointError: /no/such/folder" in done.stderr


def test_a_mistyped_option_is_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["serve", "m", "--prot", "1"])
    assert caught.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_a_bad_parameter_is_named(fake, capsys):
    assert main(["generate", "m", "hi", "--temperature", "-1"]) == 1
    assert "temperature=-1.0 must be" in capsys.readouterr().err


def test_generate_prints_the_text(fake, capsys):
    fake.script = lambda prompt: f"{prompt}, wörld"
    assert main(["generate", "m", "hello", "--temperature", "0", "--stop", "ld"]) == 0
    assert capsys.readouterr().out == "hello, wör\n"
    assert fake.submitted[0][1].greedy


def test_generate_as_a_chat_message_and_as_json(fake, capsys):
    assert main(["generate", "m", "hi", "--chat", "--json", "--max-tokens", "5"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert fake.submitted[0][0].startswith("<|im_start|>user\nhi<|im_end|>")
    assert len(got["outputs"][0]["token_ids"]) == 5
    assert got["outputs"][0]["finish_reason"] == "length"


def test_chat_keeps_the_conversation(fake, monkeypatch, capsys):
    lines = iter(["hi", "", "and you?", "/nonsense", "/system Be brief.", "again"])

    def read(console):
        return next(lines, None)

    fake.script = lambda prompt: f"answer {prompt.count('user')}"
    monkeypatch.setattr(chat, "_read", read)
    assert main(["chat", "m", "--max-tokens", "50"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(chat.HELP[:20]) == 2  # at the start, and after a command that is none
    assert "answer 1\n" in shown and "answer 2\n" in shown
    prompts = [prompt for prompt, _ in fake.submitted]
    assert "assistant\nanswer 1<|im_end|>" in prompts[1]
    assert prompts[2].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "hi" not in prompts[2].split("<|im_end|>")[1]


def test_chat_ends_with_its_input(fake, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    with sys.stdin:
        assert main(["chat", "m"]) == 0


def test_bench_in_figures(fake, capsys):
    asked = "--rounds 1 --output-len 8 --batch 3 --prefill-len 64 --json"
    assert main(["bench", "m", *asked.split()]) == 0
    got = json.loads(capsys.readouterr().out)
    assert [f["workload"] for f in got["figures"]] == ["single stream", "batch of 3", "prefill"]
    assert got["figures"][2]["decode_tokens_per_second"] is None
    assert all(f["prefill_tokens_per_second"] > 0 for f in got["figures"])
    assert len(fake.submitted) == 2 * (1 + 3 + 1)


def test_bench_as_a_table(fake, capsys):
    assert main(["bench", "m", "--rounds", "1", "--output-len", "8", "--batch", "3"]) == 0
    shown = capsys.readouterr().out
    assert "single stream" in shown and "no model at all" in shown


def test_bench_refuses_lengths_beyond_the_context_before_it_loads(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(bench, "load", lambda args: pytest.fail("it has been loaded"))
    for options in (["--output-len", "9000"], ["--prompt-len", "60", "--max-model-len", "64"]):
        assert main(["bench", checkpoint, *options]) == 1
        assert "ask for fewer" in capsys.readouterr().err


def test_bench_wants_something_to_measure(fake, capsys):
    assert main(["bench", "m", "--batch", "0"]) == 1
    assert "must be at least 1" in capsys.readouterr().err


# ---- with the real engine ------------------------------------------------------------------


def test_doctor_plans_without_loading(checkpoint, capsys):
    assert main(["doctor", checkpoint, "--max-num-seqs", "8"]) == 0
    shown = capsys.readouterr().out
    for expected in ("jaxlib", "native kernels", "compile cache", "qwen3", "programs", "8 seq"):
        assert expected in shown


def test_doctor_names_settings_that_work(checkpoint, capsys):
    assert main(["doctor", checkpoint, "--max-model-len", "512", "--num-pages", "2"]) == 1
    assert "try --max-model-len 64\n" in capsys.readouterr().out
    assert main(["doctor", checkpoint, "--memory-utilization", "1e-9"]) == 1
    assert "try --memory-utilization 0.95\n" in capsys.readouterr().out
    assert main(["doctor", checkpoint, "--max-model-len", "1000000"]) == 1
    assert "try --max-model-len 2048\n" in capsys.readouterr().out


def test_doctors_advice_is_taken_by_the_plan(checkpoint):
    read = doctor.Checkpoint.read(checkpoint, None)
    for asked in (
        EngineConfig(max_model_len=512, num_pages=2),
        EngineConfig(max_model_len=10**6, memory_utilization=1e-9),
    ):
        with pytest.raises(ConfigError):
            read.plan(asked)
        found = doctor.nearest(read, asked)
        assert found is not None
        assert read.plan(found).max_model_len == found.max_model_len


def test_doctor_rounds_weights_where_nothing_else_fits(checkpoint, monkeypatch):
    read = doctor.Checkpoint.read(checkpoint, None)
    sizes = [
        weights.weight_bytes(read.family, read.model, "bfloat16", kind) for kind in ("int8", None)
    ]
    monkeypatch.setattr(plan, "memory_limit", lambda device: sum(sizes) // 2)
    asked = EngineConfig(page_size=8)
    with pytest.raises(ConfigError, match="quantization='int8', a narrower dtype"):
        read.plan(asked)
    found = doctor.nearest(read, asked)
    assert found is not None and found.quantization == "int8"
    assert "--quantization int8" in doctor._options(asked, found)


@pytest.mark.parametrize(
    ("asked", "advice"),
    [({"kernels": "pallas"}, "--kernels auto"), ({"quantization": "fp8"}, "no --quantization")],
)
def test_doctor_takes_back_what_cannot_be_had_here(checkpoint, asked, advice):
    read, config = doctor.Checkpoint.read(checkpoint, None), EngineConfig(**asked)
    found = doctor.nearest(read, config)
    assert found is not None
    assert doctor._options(config, found) == advice


def test_doctor_plans_for_the_scales_beside_the_weights(checkpoint, monkeypatch):
    monkeypatch.setattr(cache_scales, "load", lambda *_: {"k": None})
    read = doctor.Checkpoint.read(checkpoint, None)
    assert read.plan(EngineConfig(kv_cache_dtype="int8")).kv_calibrated
    assert not read.plan(EngineConfig()).kv_calibrated


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("Unable to initialize backend 'x' (set JAX_PLATFORMS='')"), "Unable to"),
        (AssertionError(), "its backend did not start"),
    ],
)
def test_a_device_that_is_not_there_is_named(checkpoint, error, why, monkeypatch, capsys):
    def devices():
        raise error

    monkeypatch.setattr("jax.devices", devices)
    asked = rf"JAX_PLATFORMS='{os.environ['JAX_PLATFORMS']}': {why}"
    for arguments, says in (
        (["generate", checkpoint, "hi"], f"error: {asked}"),
        (["generate", checkpoint, "hi", "--tp", "2"], f"error: {asked}"),
        (["quantize", checkpoint, f"{checkpoint}-int8"], f"error: {asked}"),
    ):
        assert main(arguments) == 1
        assert says in (said := capsys.readouterr().err) and "use cpu" in said
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"none: {asked}" in said and "compile cache" in said


def test_native_kernels_say_why_not():
    code = "from jaxserve.cli.doctor import native_kernels; print(native_kernels())"
    done = command("-c", code, env=os.environ | {"JAXSERVE_NATIVE": "0"})
    assert "JAXSERVE_NATIVE=0" in done.stdout
    assert done.stderr == ""


def test_a_taken_port_is_noticed_before_anything_is_loaded(capsys):
    from jaxserve.server.run import bind

    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "/no/such/folder", "--port", port]) == 1
    assert "choose another --host or --port" in capsys.readouterr().err


def test_serve_a_checkpoint_until_sigterm(checkpoint):
    options = "--port 0 --served-model-name tiny --max-model-len 256 --api-key secret"
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxserve.cli", "serve", checkpoint, *options.split()],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = iter(process.stderr.readline, "")
        url = next(line for line in said if "serving tiny at" in line).split()[-1]
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=10) as client:
            got = client.completions.create(model="tiny", prompt="hi", max_tokens=4, temperature=0)
            stream = client.completions.create(
                model="tiny", prompt="hi", max_tokens=4, temperature=0, stream=True
            )
            assert "".join(chunk.choices[0].text for chunk in stream) == got.choices[0].text
        assert httpx.get(f"{url}/models").status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "drained and closed" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
