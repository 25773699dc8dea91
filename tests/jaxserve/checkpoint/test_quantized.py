"""Checkpoints in eight bits are served as they are stored, or as the floats they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoint import hf
from jaxserve.checkpoint.safetensors import Shards
from jaxserve.checkpoint.schemes import scheme
from jaxserve.errors import CheckpointError
from jaxserve.models.family import family
from jaxserve.quant import weights
from jaxserve.testing import write_checkpoint
from kernels_pallas.weight import Int8Weight

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 96}
NAME = "model.layers.1.self_attn.q_proj.weight"
GIVEN = "model.layers.1.self_attn.q_proj.input_scale"
ZERO = np.where(np.arange(64) == 7, 0, 1).reshape(64, 1).astype(np.float32)
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}
WEIGHTS_ONLY = json.loads(json.dumps(W8A8))
WEIGHTS_ONLY["config_groups"]["group_0"]["input_activations"] = None
FP8_ROWS = json.loads(json.dumps(W8A8).replace('"int"', '"float"'))
W8A8_BLOCKS = json.loads(
    json.dumps(W8A8)
)  # float8 with scales for blocks, as vLLM's exporter has it
W8A8_BLOCKS["config_groups"]["group_0"]["weights"] = {
    **INT8, "type": "float", "strategy": "block", "block_structure": [16, 32],
}  # fmt: skip
FP8_CACHE = {**INT8, "type": "float", "strategy": "tensor", "dynamic": False}
FBGEMM = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}
FP8_TENSORS = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
FP8_BLOCKS = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [16, 32],
}  # fmt: skip

IN_INT8 = {"in_int8": weights.is_large, "rounded": weights.round_to_int8}


def stored(x: np.ndarray, config: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors, by what follows the name, and the floats that they stand for."""
    x = x.astype(np.float32)
    if config is FP8_TENSORS:  # transformers' name of a scale
        scale = np.float32(np.abs(x).max() / 448)
        values = (x / scale).astype(ml_dtypes.float8_e4m3fn)
        return {"": values, "_scale_inv": np.asarray(scale)}, values.astype(np.float32) * scale
    if config in (FP8_BLOCKS, W8A8_BLOCKS):
        tiles = [-(-n // b) for n, b in zip(x.shape, (16, 32), strict=True)]
        scale = np.random.default_rng(0).uniform(0.5, 2, tiles).astype(np.float32)
        whole = scale.repeat(16, 0).repeat(32, 1)[: x.shape[0], : x.shape[1]]
        values = (x / whole).astype(ml_dtypes.float8_e4m3fn)
        suffix = "_scale_inv" if config is FP8_BLOCKS else "_scale"
        return {"": values, suffix: scale}, values.astype(np.float32) * whole
    if config in (FP8_ROWS, FBGEMM):
        scale = np.abs(x).max(1, keepdims=True) / 448
        values = (x / scale).astype(ml_dtypes.float8_e4m3fn)
    else:
        scale = np.abs(x).max(1, keepdims=True) / 120  # not what we would have chosen
        values = np.rint(x / scale).astype(np.int8)
    return {"": values, "_scale": scale}, values.astype(np.float32) * scale


def write(folder: Path, config: dict[str, Any], model_type: str = "llama") -> dict[str, np.ndarray]:
    """A checkpoint in eight bits; returns the floats of its large weights by name."""
    write_checkpoint(folder, model_type, tokenizer=False, **SMALL, quantization_config=config)
    path, floats = folder / "model.safetensors", {}
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        parts, floats[name] = stored(tensors.pop(name), config)
        tensors |= {name + suffix: x for suffix, x in parts.items()}
    save_file(tensors, path)
    return floats


def load(folder: Path, **options: Any) -> Any:
    raw = hf.read_config(folder)
    f = family(raw["model_type"])
    return hf.load_params(folder, f, hf.model_config(f, raw), "float32", progress=False, **options)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize(
    "config",
    [W8A8, WEIGHTS_ONLY, FP8_ROWS, FP8_BLOCKS, W8A8_BLOCKS, FP8_TENSORS, FBGEMM],
)
def test_floats_are_what_the_bits_stand_for(tmp_path, config, model_type):
    floats = write(tmp_path / "eight", config, model_type)
    write_checkpoint(tmp_path / "plain", model_type, tokenizer=False, **SMALL)
    path = tmp_path / "plain" / "model.safetensors"
    save_file({**load_file(path), **floats}, path)
    for found, want in zip(
        jax.tree.leaves(load(tmp_path / "eight")), jax.tree.leaves(load(tmp_path / "plain")),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(found, want)


def test_int8_is_kept_to_the_bit(tmp_path):
    floats = write(tmp_path, W8A8)
    params = load(tmp_path, **IN_INT8)
    wq = params.stacks[0].attn.wq
    assert isinstance(wq, Int8Weight) and wq.values.dtype == np.int8
    assert np.abs(np.asarray(wq.values, np.int32)).max() == 120, "not rounded a second time"
    np.testing.assert_array_equal(wq.dequantized()[1].reshape(-1, 64), floats[NAME])
    assert isinstance(params.lm_head, Int8Weight), "stored as floats, so it is rounded here"
    assert not isinstance(params.embed, Int8Weight)


@pytest.mark.slow
def test_what_a_checkpoint_is_made_for_is_how_it_is_served(tmp_path):
    for config, expected in ((W8A8, "int8"), (WEIGHTS_ONLY, None), (FP8_BLOCKS, None)):
        write(tmp_path, config)
        with LLM(tmp_path, tokenizer=False, num_pages=8, progress=False) as llm:
            assert llm.plan.quantization == expected
            prompt = {"prompt_token_ids": [1, 2, 3]}
            (out,) = llm.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))
            assert len(out.outputs[0].token_ids) == 4


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    path, shards = folder / "model.safetensors", Shards(folder)
    tensors = {**{name: shards.get(name) for name in shards.tensors}, **changes}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


def test_groups_of_modules_may_differ_in_what_shares_a_scale(tmp_path):
    """As llm-compressor writes them: rows of attention, blocks of the MLP."""
    config = json.loads(json.dumps(FP8_ROWS))
    rows, tiles = (c["config_groups"]["group_0"] for c in (FP8_ROWS, W8A8_BLOCKS))
    config["config_groups"] = {
        "group_0": {**rows, "targets": ["re:.*self_attn.*"]},
        "group_1": {**tiles, "targets": ["re:.*mlp.*"]},
    }
    write_checkpoint(tmp_path, "llama", tokenizer=False, **SMALL, quantization_config=config)
    tensors, floats = load_file(tmp_path / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        kind = FP8_ROWS if "self_attn" in name else W8A8_BLOCKS
        parts, floats[name] = stored(tensors.pop(name), kind)
        tensors |= {name + suffix: x for suffix, x in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    layers = load(tmp_path).stacks[0]
    np.testing.assert_array_equal(np.asarray(layers.attn.wq)[1].reshape(64, 64), floats[NAME])
    np.testing.assert_array_equal(layers.mlp.w_up[1], floats["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    "said",
    [
        {**W8A8, "config_groups": {}, "kv_cache_scheme": FP8_CACHE, "format": "dense"},
        {**W8A8, "config_groups": {"attention": {"weights": None, "input_activations": FP8_CACHE}}},
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
    ],
)
def test_a_cache_in_eight_bits_says_nothing_of_weights(said):
    assert scheme({"quantization_config": said}) is None


@pytest.mark.parametrize("key", ["compression_config", "text_config", "hf_quant_config.json"])
def test_where_else_it_may_be_said(tmp_path, key):
    kind = FP8_ROWS if key == "hf_quant_config.json" else W8A8
    floats = write(tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text())
    said = config.pop("quantization_config")
    if key == "compression_config":
        config[key] = said
    elif key == "text_config":  # as wrappers of models that also see have it
        config |= {key: {"quantization_config": said}, "quantization_config": None}
    else:
        modelopt = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["lm_head"]}
        (tmp_path / key).write_text(json.dumps({"quantization": modelopt}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    wq = load(tmp_path).stacks[0].attn.wq
    np.testing.assert_array_equal(np.asarray(wq)[1].reshape(64, 64), floats[NAME])


MODELOPT = {"producer": {"name": "modelopt", "version": "0.29"}, "quantization": {}}
ROWS = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["lm_head"]}
BLOCKS = {"activation_scheme": "dynamic", "weight_block_size": [16, 32]}


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [
        (FP8_ROWS, {"quant_method": "modelopt", "quantization": ROWS}),
        (FP8_ROWS, {**MODELOPT, "quantization": ROWS}),
        (FP8_ROWS, {"quant_method": "modelopt", "quant_algo": "fp8_per_channel_per_token"}),
        (FP8_BLOCKS, {"quant_method": "fp8", "fmt": "float8_e4m3fn", **BLOCKS}),
        (FP8_BLOCKS, {"quant_method": "FP8", **BLOCKS}),
        (W8A8, {**W8A8, "quant_method": "compressed_tensors"}),
    ],
)
def test_other_spellings_of_the_same(tmp_path, kind, spelling):
    """Which vLLM takes, and so checkpoints have."""
    floats = write(tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = spelling
    (tmp_path / "config.json").write_text(json.dumps(config))
    wq = load(tmp_path).stacks[0].attn.wq
    np.testing.assert_array_equal(np.asarray(wq)[1].reshape(64, 64), floats[NAME])


@pytest.mark.parametrize("algorithm", ["FP8_PB_WO", "fp8_pb_wo"])
def test_blocks_of_modelopt_have_axes_of_one_behind_them(tmp_path, algorithm):
    said = {**MODELOPT, "quantization": {"quant_algo": algorithm}}
    sizes = {**SMALL, "hidden_size": 192, "head_dim": 16}
    write_checkpoint(tmp_path, "llama", tokenizer=False, **sizes, quantization_config=said)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        n, k = (-(-size // 128) for size in tensors[name].shape)
        tensors[name + "_scale"] = np.arange(1, n * k + 1, dtype=np.float32).reshape(n, 1, k, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    found = np.asarray(load(tmp_path).stacks[0].mlp.w_up[1])
    name = "model.layers.1.mlp.up_proj.weight"
    tiles = tensors[name + "_scale"][:, 0, :, 0]
    whole = tiles.repeat(128, 0).repeat(128, 1)[: found.shape[0], : found.shape[1]]
    assert len(set(whole.reshape(-1).tolist())) > 1
    np.testing.assert_array_equal(found, tensors[name].astype(np.float32) * whole)


@pytest.mark.parametrize("part", ["qweight", "weight_packed"])
def test_weights_that_are_packed_in_fewer_bits_are_named(tmp_path, part):
    """Old exporters of GPTQ and AWQ say nothing of it in config.json."""
    write_checkpoint(tmp_path, "llama", tokenizer=False, **SMALL)
    key = NAME.removesuffix("weight") + part
    rewrite(tmp_path, **{NAME: None, key: np.zeros((8, 64), np.int32)})
    message = rf"no tensor '{NAME}', but {key} int32 \[8, 64\]: .*\(GPTQ, AWQ\).* in floats"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"quantization_config": FBGEMM}}, "and in text_config .*fbgemm_fp8"),
        ({"quantization_config": None, "text_config": {"compression_config": 5}}, "be an object"),
        ({"quantization_config": None, "compression_config": "x"}, "must be an object"),
        (
            {"quantization_config": None, "text_config": {"quantization_config": {
                "quant_method": "gptq", "bits": 4}}}, "quant_method 'gptq'",
        ),
    ],
)  # fmt: skip
def test_what_is_said_elsewhere_is_refused_as_if_it_were_said_here(tmp_path, changes, message):
    write(tmp_path, W8A8)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_what_stays_in_floats_is_of_the_type_that_is_served(tmp_path):
    """An exporter that was told of no exceptions rounds tables and routers too."""
    write(tmp_path, W8A8, "qwen3_moe")
    table = "model.embed_tokens.weight"
    parts, floats = stored(load_file(tmp_path / "model.safetensors")[table], W8A8)
    rewrite(tmp_path, **{table + suffix: x for suffix, x in parts.items()})
    raw = hf.read_config(tmp_path)
    f = family(raw["model_type"])
    params = hf.load_params(
        tmp_path, f, hf.model_config(f, raw), "bfloat16", progress=False, **IN_INT8
    )
    assert params.embed.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(params.embed, floats.astype(ml_dtypes.bfloat16))
    assert isinstance(params.lm_head, Int8Weight)


def test_exponents_as_scales(tmp_path):
    write(tmp_path, FP8_BLOCKS)
    scale = np.full((4, 2), 0.25, ml_dtypes.float8_e8m0fnu)
    values = np.ones((64, 64), ml_dtypes.float8_e4m3fn)
    rewrite(tmp_path, **{NAME: values, NAME + "_scale_inv": scale})
    assert np.all(np.asarray(load(tmp_path).stacks[0].attn.wq[1]) == 0.25)


@pytest.mark.parametrize("options", [{}, IN_INT8])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NAME + "_scale": None}, f"{NAME}_scale is missing"),
        ({NAME + "_scale": np.ones((7, 1), np.float32)}, rf"{NAME}_scale has shape \[7, 1\]"),
        ({NAME + "_scale": np.full((64, 1), np.nan, np.float32)}, f"{NAME}_scale .*NaN"),
        ({NAME + "_scale": np.full((64, 1), -1, np.float32)}, f"{NAME}_scale .*below 0"),
        ({NAME + "_scale": np.ones((64, 1), np.int32)}, f"{NAME}_scale is int32; expected float"),
        ({NAME + "_zero_point": np.ones((64, 1), np.int8)}, f"{NAME}_zero_point is not 0"),
        ({NAME: np.ones((64, 64), np.float32)}, rf"{NAME} .*float32 \[64, 64\].*{NAME}_scale"),
        ({NAME: np.asarray(3, np.int8)}, rf"{NAME} in model.safetensors is int8 \[\]; only matr"),
        ({NAME: np.zeros((64, 1, 64), np.int8)}, rf"{NAME} .*int8 \[64, 1, 64\]; only matrices"),
        (
            {NAME: np.zeros((64, 64), ml_dtypes.float8_e4m3fn)},
            rf"{NAME} in model.safetensors is float8_e4m3fn \[64, 64\], but .* says int8",
        ),
        ({NAME: np.zeros((64, 63), np.int8)}, rf"{NAME} has shape \[64, 63\]; expected \[.*64\]"),
        ({NAME + "_scale": np.ones((8, 8), np.float32)}, rf"{NAME}_scale has shape \[8, 8\]"),
        (
            {NAME + "_scale": np.ones(1, np.float32)},
            rf"{NAME}_scale has shape \[1\]; expected \[64",
        ),
        ({NAME + "_scale": ZERO}, rf"{NAME}_scale \[64, 1\] is 0 at \[7, 0\], where {NAME} \[64"),
        ({GIVEN: np.ones(1, np.int32)}, rf"{GIVEN} is int32 \[1\]; expected one number"),
        ({GIVEN: np.ones((64, 1), np.float32)}, rf"{GIVEN} is float32 \[64, 1\]; expected one"),
        ({GIVEN: np.full(1, -1, np.float32)}, rf"{GIVEN} is float32 \[1\] and holds -1.0"),
        ({GIVEN: np.full(1, np.nan, np.float32)}, rf"{GIVEN} .*NaN"),
    ],
)
def test_a_corrupt_checkpoint_is_refused_by_name(tmp_path, changes, message, options):
    write(tmp_path, W8A8)
    rewrite(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, **options)


def test_a_float8_of_another_format_than_config_json_says(tmp_path):
    write(tmp_path, FP8_BLOCKS)
    rewrite(tmp_path, **{NAME: np.ones((64, 64), ml_dtypes.float8_e5m2)})
    seen = rf"{NAME} in model.safetensors is float8_e5m2 \[64, 64\], but .* says e4m3"
    with pytest.raises(CheckpointError, match=seen):
        load(tmp_path)


@pytest.mark.parametrize("config", [W8A8, FP8_BLOCKS])
def test_a_scale_of_zero_is_that_of_zeros(tmp_path, config):
    """As exporters write rows that a model never uses."""
    write(tmp_path, config)
    shards, key = Shards(tmp_path), NAME + ("_scale" if config is W8A8 else "_scale_inv")
    values, scale = (shards.get(name).copy() for name in (NAME, key))
    rows, cols = (slice(7, 8), slice(None)) if config is W8A8 else (slice(16, 32), slice(32, 64))
    at = (7, 0) if config is W8A8 else (1, 1)
    scale[at], values[rows, cols] = 0, 0
    rewrite(tmp_path, **{NAME: values, key: scale})
    found = np.asarray(load(tmp_path).stacks[0].attn.wq[1]).reshape(64, 64)
    assert not found[rows, cols].any() and found.any()
    values[rows, cols] = 1
    rewrite(tmp_path, **{NAME: values, key: scale})
    with pytest.raises(CheckpointError, match=rf"{key} .*is 0 at \[{at[0]}, {at[1]}\]"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["input_scale", "activation_scale"])
def test_scales_of_activations_are_said_to_be_passed_over(tmp_path, caplog, name):
    write(tmp_path, FP8_TENSORS)
    before, key = load(tmp_path), NAME.replace("weight", name)
    assert not caplog.records
    rewrite(tmp_path, **{key: np.full(1, 0.5, np.float32)})
    for found, want in zip(jax.tree.leaves(load(tmp_path)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(found, want)
    assert [f"such as {key}, are not used" in r.getMessage() for r in caplog.records] == [True]


@pytest.mark.parametrize("said", [None, W8A8, FP8_BLOCKS])
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_experts_that_share_a_tensor_are_named(tmp_path, said, dtype):
    """As transformers holds them, and writes them with `save_original_format=False`."""
    write_checkpoint(tmp_path, "qwen3_moe", tokenizer=False, **SMALL, quantization_config=said)
    tensors = load_file(tmp_path / "model.safetensors")
    first = "model.layers.0.mlp.experts."
    gone = {name: None for name in tensors if name.startswith(first)}
    rewrite(tmp_path, **gone, **{first + "gate_up_proj": np.ones((4, 64, 64), dtype)})
    kind = np.dtype(dtype).name
    message = rf"no tensor '{first}0.*but {first}gate_up_proj {kind} \[4, 64, 64\]: tensors of all"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("gpt_oss", "mlp.experts.gate_up_proj"), ("deepseek_v3", "self_attn.kv_b_proj.weight")],
)
@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_a_joint_tensor_in_eight_bits_is_not_taken_for_floats(tmp_path, model_type, name, dtype):
    write_checkpoint(tmp_path, model_type, tokenizer=False)
    name = f"model.layers.0.{name}"
    x = load_file(tmp_path / "model.safetensors")[name]
    rewrite(tmp_path, **{name: np.ones(x.shape, dtype)})
    kind = np.dtype(dtype).name
    with pytest.raises(CheckpointError, match=rf"{name} .*{kind}.*\[.*no quantization_config"):
        load(tmp_path)


def test_a_matrix_that_lies_the_other_way_is_refused(tmp_path):
    """One scale for all of it fits both ways, and so does the number of values."""
    write(tmp_path, FP8_TENSORS)
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(tmp_path, **{name: np.ones((128, 64), ml_dtypes.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=rf"{name} .*\[128, 64\]; expected \[64, 128\]"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "suffix", "scale"),
    [
        (FBGEMM, "_scale", np.ones(1, np.float32)),
        (FP8_BLOCKS, "_scale_inv", np.ones((64, 1), np.float32)),
        (FP8_BLOCKS, "_scale_inv", np.ones((2, 4), np.float32)),
        (W8A8_BLOCKS, "_scale", np.ones(1, np.float32)),
        (FP8_TENSORS, "_scale_inv", np.ones((8, 8), np.float32)),
    ],
)
def test_scales_of_another_structure_than_config_json_says(tmp_path, config, suffix, scale):
    write(tmp_path, config)
    rewrite(tmp_path, **{NAME + suffix: scale})
    seen = ", ".join(map(str, scale.shape))
    with pytest.raises(CheckpointError, match=rf"{NAME}{suffix} has shape \[{seen}\]; expected"):
        load(tmp_path)


def test_a_scale_for_the_tensor_where_one_for_each_row_is_there(tmp_path):
    write(tmp_path, json.loads(json.dumps(W8A8).replace('"channel"', '"tensor"')))
    with pytest.raises(CheckpointError, match=r"_scale has shape \[64, 1\]; expected \[1\]"):
        load(tmp_path)


def test_a_scale_that_makes_no_number_of_the_largest_is_refused(tmp_path):
    write(tmp_path, W8A8)
    rewrite(tmp_path, **{NAME + "_scale": np.full((64, 1), 3e38, np.float32)})
    for options in ({}, IN_INT8):
        with pytest.raises(CheckpointError, match=rf"{NAME} .*(infinity|exceeds float32)"):
            load(tmp_path, **options)


def test_eight_bits_that_config_json_does_not_speak_of(tmp_path):
    write(tmp_path, W8A8)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"type int8 and shape .* no quantization_config"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pack-quantized"}, "format 'pack-quantized'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format 'sparse"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"sparsity_config": "dense"}, "sparsity_config 'dense': expected an object"),
        ({"transform_config": ["R1"]}, r"transform_config \['R1'\]: expected an object"),
        ({"quant_method": "modelopt", "quantization": "FP8"}, "quantization 'FP8': expected an ob"),
        ({"config_groups": {"a": {"weights": {**INT8}, "input_activations": "x"}}}, "s 'x': exp"),
        ({"quant_method": "fp8", "weight_block_size": ["a", 1]}, "weight_block_size .*whole"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": [1]}, "config_groups"),
        ({"config_groups": {"a": {"weights": {**INT8, "num_bits": 4}}}}, "num_bits 4"),
        ({"config_groups": {"a": {"weights": {**INT8, "strategy": "group"}}}}, "strategy 'group'"),
        ({"config_groups": {"a": {"weights": {**INT8, "symmetric": False}}}}, "symmetric False"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128"),
        ({"quant_method": "fp8", "activation_scheme": "odd"}, "activation_scheme 'odd'"),
        ({"quant_method": "fp8", "fmt": "e3m4"}, "fmt 'e3m4' .*known: 'e4m3', 'e5m2'"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        scheme({"quantization_config": {**W8A8, **change}})
