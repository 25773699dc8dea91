"""What is decided from what was asked: sizes that fit, or an error that names the nearest."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.checkpoint import hf
from jaxserve.config import OTHER_NAMES, STORED, EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.family import family
from jaxserve.plan import Plan, resolve
from jaxserve.testing import family_config

GIB = 1 << 30
WEIGHTS = 100_000
RAW = family_config("qwen3", max_position_embeddings=4096)
CFG = hf.model_config(family("qwen3"), RAW)
W8A8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "dynamic": True},
        }
    },
}


@dataclasses.dataclass
class Device:
    """An accelerator with so much memory."""

    platform: str = "tpu"
    limit: int = 16 * GIB
    device_kind: str = "TPU v6 lite"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": 0}


def plan(device: Any = None, num_params: int = WEIGHTS, **asked: Any) -> Plan:
    device = device or jax.devices()[0]
    return resolve(EngineConfig(**asked), RAW, CFG, stored_as(num_params), device)


def stored_as(num_params: int) -> Any:
    """Bytes of as many weights in an element type."""
    return lambda dtype, quantization: num_params * jnp.dtype(dtype).itemsize


WRONG: list[tuple[str, list[Any]]] = [
    ("kv_cache_dtype", ["fp8", "fp8_e4m3", "int2", None, 8]),
    ("quantization", ["int3", "awq", 8, "INT8", ""]),
    ("dtype", ["int8", "fp32", None, 4]),
    ("max_model_len", [0, -1, 1.5, "100"]),
    ("max_num_seqs", [0, -1, 2.5, "8"]),
    ("max_num_batched_tokens", [0, -5, 2.5, "8"]),
    ("page_size", [0, -8, 4, 12, 16.0, "16"]),
    ("num_pages", [0, -1, 1.5, "8"]),
    ("memory_utilization", [0, -0.1, 1.1, float("nan"), "0.9", None]),
    ("tensor_parallel_size", [0, -2, 1.5, None, "2"]),
    ("data_parallel_size", [0, -2, 1.5, "2"]),
    ("expert_parallel_size", [0, -4, 1.5, None, "4"]),
    ("sequence_parallel_size", [0, -4, 1.5, None, "4"]),
    ("num_redundant_experts", [-1, 1.5, None, "1"]),
    ("eplb_step_interval", [0, -3, 1.5, "1"]),
    ("enable_dbo", [None, "yes", 2]),
    ("enable_return_routed_experts", [None, "yes"]),
    ("enable_route_noise", [None, "yes"]),
    ("reward_head", ["", 1]),
    ("seed", [None, 1.5, "0"]),
    ("enable_prefix_caching", [None, "no", 2]),
    ("disable_cascade_attn", [None, "no", 2]),
    ("decode_steps", [0, 65, 1.5, None]),
    ("kernels", ["fast", None, 1]),
    ("load_format", ["gguf", None]),
    ("background_compile", [None, "no"]),
    ("forbid_compile", [None, "yes"]),
    ("progress", [None, "bar"]),
]
CASES = [(name, value) for name, values in WRONG for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n}={v!r}" for n, v in CASES])
def test_a_setting_that_cannot_be_is_refused_by_name(name: str, value: Any):
    with pytest.raises(ConfigError, match=f"^{name}="):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (jnp.bfloat16, "bfloat16"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        (np.float32, "float32"),
        ("torch.bfloat16", "bfloat16"),
        ("half", "float16"),
        ("float", "float32"),
        ("auto", "auto"),
    ],
)
def test_a_type_may_be_spelt_as_elsewhere(asked: Any, name: str):
    assert EngineConfig.of({"dtype": asked}).dtype == name


@pytest.mark.parametrize("asked", ["bf16", None, 16, jnp.int8])
def test_what_is_no_type_of_weights_is_refused(asked: Any):
    with pytest.raises(ConfigError, match=r"^dtype=.* must be one of auto, float32, bfloat16"):
        EngineConfig.of({"dtype": asked})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("torch_dtype", "here it is dtype"),
        ("load_in_8bit", "here it is quantization='int8'"),
        ("kv_cache_memory_bytes", "here it is num_pages"),
        ("enable_eplb", "here it is eplb_step_interval"),
        ("max_model_length", "did you mean max_model_len?"),
        ("speculative_config", "known: background_compile"),
    ],
)
def test_an_unknown_setting_is_answered_with_what_it_is_here(name: str, remedy: str):
    assert name not in {f.name for f in dataclasses.fields(EngineConfig)}
    with pytest.raises(ConfigError, match=f"^unknown setting '{name}'; {re.escape(remedy)}"):
        EngineConfig.of({name: 1})


def test_other_names_are_none_of_ours():
    assert not set(OTHER_NAMES) & {f.name for f in dataclasses.fields(EngineConfig)}


def test_every_setting_is_checked():
    assert {name for name, _ in WRONG} == {f.name for f in dataclasses.fields(EngineConfig)}


@given(
    utilization=st.floats(0.05, 1.0),
    memory=st.integers(1 << 24, 1 << 36),
    seqs=st.integers(1, 5000),
    batched=st.integers(1, 10**6),
    page=st.sampled_from([8, 16, 64, 512]),
    length=st.none() | st.integers(1, 4096),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_plan_fits_or_names_a_setting_that_does(
    utilization: float, memory: int, seqs: int, batched: int, page: int, length: int | None
):
    asked: dict[str, Any] = {
        "memory_utilization": utilization,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": batched,
        "page_size": page,
        "max_model_len": length,
    }
    device = Device(limit=memory)
    try:
        made = plan(device, **asked)
    except ConfigError as error:
        name, value = re.findall(r"(\w+)=([\d.]+)", str(error))[-1]
        made = plan(device, **asked | {name: type(asked[name] or 1)(float(value))})
        utilization = made_utilization(asked, name, value)
    assert made.weight_bytes + made.kv_bytes <= utilization * memory * 1.01
    assert 1 <= made.max_model_len <= made.num_pages * made.page_size
    assert made.max_num_batched_tokens >= made.max_num_seqs
    assert list(made.token_buckets) == sorted(set(made.token_buckets))
    assert hash(made) == hash(dataclasses.replace(made))


def made_utilization(asked: dict[str, Any], name: str, value: str) -> float:
    return float(value) if name == "memory_utilization" else asked["memory_utilization"]


def test_defaults_depend_on_the_device():
    cpu, tpu = plan(), plan(Device())
    assert (cpu.page_size, cpu.max_num_seqs, cpu.max_num_batched_tokens) == (32, 64, 1024)
    assert (tpu.page_size, tpu.max_num_seqs, tpu.max_num_batched_tokens) == (64, 256, 2048)
    assert cpu.activation_dtype == jnp.float32
    assert cpu.max_model_len == 4096
    assert cpu.kv_bytes <= 2 * GIB, "on a CPU memory is shared with everything else"


@pytest.mark.parametrize(
    ("stored", "asked", "kernels", "platform", "served"),
    [
        ("bfloat16", "auto", "native", "cpu", "bfloat16"),
        ("bfloat16", "auto", "reference", "cpu", "float32"),
        ("float16", "auto", "auto", "tpu", "bfloat16"),
        ("float32", "auto", "auto", "tpu", "float32"),
        ("float32", "bfloat16", "reference", "cpu", "bfloat16"),
    ],
)
def test_element_types(stored: str, asked: str, kernels: str, platform: str, served: str):
    if kernels == "native" and plan().kernels != "native":
        pytest.skip("no C++ compiler")
    device = jax.devices()[0] if platform == "cpu" else Device()
    raw = {**RAW, "torch_dtype": stored, "dtype": None}
    config = EngineConfig(dtype=asked, kernels=kernels)  # type: ignore[arg-type]
    assert resolve(config, raw, CFG, stored_as(WEIGHTS), device).dtype == jnp.dtype(served)


def test_native_kernels_refuse_float16_before_anything_starts():
    if plan().kernels != "native":
        pytest.skip("no C++ compiler")
    with pytest.raises(ConfigError, match=r"'float16'.*'bfloat16'.*'float32'"):
        plan(dtype="float16")
    assert plan(dtype="float16", kernels="reference").dtype == jnp.float16


@pytest.mark.parametrize("method", STORED)
def test_what_a_checkpoint_is_stored_in_may_be_said_and_must_be_so(method: str):
    """vLLM's users write `--quantization compressed-tensors`, and so on."""
    config = EngineConfig(quantization=method)  # type: ignore[arg-type]

    def planned(said: dict[str, Any] | None) -> Plan:
        raw = {**RAW, "quantization_config": said}
        return resolve(config, raw, CFG, stored_as(WEIGHTS), jax.devices()[0])

    found = planned(W8A8 if method == W8A8["quant_method"] else {"quant_method": method})
    assert found.quantization == ("int8" if method == W8A8["quant_method"] else None)
    for said, seen in (
        ({"quant_method": "other"}, "says quant_method 'other'"),
        (None, "speaks of no quantisation"),
    ):
        message = rf"quantization='{method}': .* {seen}\. .* quantization='int8'"
        with pytest.raises(ConfigError, match=message):
            planned(said)


def test_a_cache_of_bfloat16_is_that_of_a_model_in_bfloat16_or_on_a_cpu():
    own, asked = (plan(dtype="bfloat16", kv_cache_dtype=kind) for kind in ("auto", "bfloat16"))
    assert own == asked and own.kv_taint == "exact"
    rounded = plan(dtype="float32", kv_cache_dtype="bfloat16")
    assert (rounded.kv_dtype, rounded.kv_taint) == (own.kv_dtype, "bfloat16")
    device = Device()
    assert plan(device, dtype="bfloat16", kv_cache_dtype="bfloat16").page_size == 64
    with pytest.raises(ConfigError, match="kv_cache_dtype='bfloat16' with dtype float32 on a tpu"):
        plan(device, dtype="float32", kv_cache_dtype="bfloat16")


def test_kernels_need_their_hardware():
    with pytest.raises(ConfigError, match=r"kernels='native'.*tpu"):
        plan(Device(), kernels="native")
    with pytest.raises(ConfigError, match=r"kernels='pallas' needs a TPU or a GPU; .*cpu"):
        plan(kernels="pallas")


def test_pages_are_as_wide_as_kernels_want_them():
    whole = (CFG.kv_heads, 128, 128)
    assert plan(Device()).kv_shape == whole != CFG.kv_shape
    assert plan(Device(), kernels="reference").kv_shape == plan().kv_shape == CFG.kv_shape


def test_a_context_beyond_the_model_names_the_longest():
    with pytest.raises(ConfigError, match=r"max_model_len=5000 .*4096"):
        plan(max_model_len=5000)


def test_a_context_beyond_the_cache_names_the_nearest():
    with pytest.raises(ConfigError, match=r"max_model_len=100 .* max_model_len=64$"):
        plan(num_pages=8, page_size=8, max_model_len=100)
    assert plan(num_pages=8, page_size=8, max_model_len=64).max_model_len == 64
    assert plan(num_pages=8, page_size=8).max_model_len == 64


def test_a_pool_beyond_the_memory_names_the_nearest():
    device = Device(limit=GIB)
    with pytest.raises(ConfigError, match=r"num_pages=1000000000 .*num_pages=\d+$") as raised:
        plan(device, num_pages=10**9)
    nearest = int(str(raised.value).rsplit("=", 1)[1])
    made = plan(device, num_pages=nearest)
    assert made.kv_bytes + made.weight_bytes <= GIB
    with pytest.raises(ConfigError):
        plan(device, num_pages=nearest + 1)


def test_a_utilization_that_leaves_no_page_names_the_nearest():
    device = Device(limit=10 * GIB)
    with pytest.raises(ConfigError, match=r"memory_utilization=0\.1 .*memory_utilization=0\.\d+$"):
        plan(device, num_params=GIB, memory_utilization=0.1)


def test_a_model_beyond_the_memory_says_so():
    with pytest.raises(ConfigError, match=r"4\.00 GiB.*1\.00 GiB.*(smaller model|narrower dtype)"):
        plan(Device(limit=GIB), num_params=GIB, memory_utilization=0.1)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens"])
def test_more_than_can_ever_run_is_not_made_room_for(name: str):
    made = plan(num_pages=100, page_size=8, **{name: 10**9})
    assert made.max_num_seqs <= 100
    assert made.max_num_batched_tokens <= 800


@given(largest=st.integers(1, 5000), seqs=st.integers(1, 300))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_programs_are_few_and_counted(largest: int, seqs: int):
    made = plan(max_num_batched_tokens=largest, max_num_seqs=seqs)
    buckets = made.token_buckets
    assert buckets[-1] == max(largest, seqs)
    assert all(b <= 2 * a for a, b in itertools.pairwise(buckets))
    assert made.num_programs <= len(buckets) + 2 * len(made.row_buckets) + 3
    kinds = {kind for kind, _ in made.programs}
    assert kinds == {"forward", "sample", "step", "seed_history", "copy_pages"}
    for tokens in range(1, buckets[-1] + 1):  # whatever fits the largest step fits a program
        rows = made.rows(tokens)
        steps = [made.step_tokens(r) for kind, r in made.programs if kind == "step" and r >= rows]
        parts = [t for kind, t in made.programs if kind == "forward" and made.rows(t) >= rows]
        assert max(steps + parts) >= tokens
    assert all(made.rows(t) <= made.max_num_seqs for t in buckets)


def test_the_plan_is_said_in_one_line():
    line = plan(num_pages=100, page_size=8).describe()
    for part in ("cpu", "100 pages", "8 tokens", "context 800", "programs"):
        assert part in line
    assert "\n" not in line
