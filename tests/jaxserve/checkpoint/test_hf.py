"""Folders in Hugging Face's format become trees of weights, or errors that name the fault."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoint import hf
from jaxserve.checkpoint.hub import resolve
from jaxserve.errors import CheckpointError
from jaxserve.models.family import family
from jaxserve.testing import FAMILIES, MXFP4, write_checkpoint
from sharding.tree import abstract

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}


def write(folder, model_type="llama", **settings):
    return write_checkpoint(folder, model_type, tokenizer=False, **{**SMALL, **settings})


def load(folder, dtype=jnp.float32):
    config = hf.read_config(folder)
    f = family(config.get("model_type"))
    return hf.load_params(folder, f, hf.model_config(f, config), dtype, progress=False)


def rewrite(folder, **changes):
    """Replaces tensors of a single shard; None drops one."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_leaf_of_every_family_is_filled(tmp_path, model_type):
    folder = write_checkpoint(tmp_path, model_type, tokenizer=False)
    config = hf.read_config(folder)
    f = family(model_type)
    cfg = hf.model_config(f, config)
    params = hf.load_params(folder, f, cfg, jnp.bfloat16, progress=False)
    assert abstract(f.declare_params(cfg), cfg.sizes, jnp.bfloat16) == jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
    )
    stored = sum(x.size for x in load_file(folder / "model.safetensors").values())
    assert sum(x.size for x in jax.tree.leaves(params)) == stored, "each value has its place"


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_values_are_the_stored_ones_whatever_their_type_and_shards(tmp_path, source, shards):
    folder = write(tmp_path, dtype=source, shards=shards)
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    params = load(folder)
    wq = np.stack([tensors[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(2)])
    got = params.stacks[0].attn.wq
    np.testing.assert_array_equal(got.reshape(wq.shape), wq.astype(np.float32))
    np.testing.assert_array_equal(params.lm_head, tensors["lm_head.weight"].astype(np.float32))


def test_a_leaf_keeps_the_type_it_declares(tmp_path):
    params = load(write_checkpoint(tmp_path, "deepseek_v3", tokenizer=False), jnp.bfloat16)
    assert params.stacks[1].mlp.router.dtype == jnp.bfloat16
    assert params.stacks[1].mlp.correction.dtype == jnp.float32


def test_gate_and_up_of_gpt_oss_are_taken_apart(tmp_path):
    plain = load(write_checkpoint(tmp_path / "plain", "gpt_oss", tokenizer=False))
    joint = load_file(tmp_path / "plain" / "model.safetensors")
    stored = joint["model.layers.1.mlp.experts.gate_up_proj"]  # [E, in, 2 * out]
    experts = plain.stacks[0].mlp.experts
    np.testing.assert_array_equal(experts.w_gate[1], stored[..., 0::2].swapaxes(1, 2))
    np.testing.assert_array_equal(experts.w_up[1], stored[..., 1::2].swapaxes(1, 2))
    quantised = write_checkpoint(
        tmp_path / "mxfp4", "gpt_oss", tokenizer=False, quantization_config=MXFP4
    )
    shapes = [jax.tree.map(jnp.shape, params) for params in (plain, load(quantised))]
    assert shapes[0] == shapes[1]


def test_layers_for_multi_token_prediction_stay_unread(tmp_path, caplog):
    folder = write_checkpoint(tmp_path, "deepseek_v3", tokenizer=False)
    before = load(folder)
    rewrite(folder, **{"model.layers.3.eh_proj.weight": np.full((2, 2), np.nan, np.float32)})
    config = {**hf.read_config(folder), "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    same = jax.tree.map(np.array_equal, before, load(folder))
    assert all(jax.tree.leaves(same)) and not caplog.records


@pytest.mark.parametrize(
    ("model_type", "change", "count", "first"),
    [
        ("llama", {"num_hidden_layers": 1}, 9, "1.input_layernorm.weight float32 [32]"),
        ("gpt_oss", {"attention_bias": False}, 8, "0.self_attn.k_proj.bias float32"),
        ("deepseek_v3", {"n_shared_experts": 0}, 3, "1.mlp.shared_experts.down_proj.weight"),
        ("llama", {}, 0, ""),
        ("gemma3_text", {}, 0, ""),
        ("gpt_oss", {}, 0, ""),
    ],
)
def test_weights_that_config_json_does_not_ask_for_are_told(
    tmp_path, caplog, model_type, change, count, first
):
    folder = write(tmp_path, model_type)
    config = {**hf.read_config(folder), **change}
    (folder / "config.json").write_text(json.dumps(config))
    load(folder)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(count)
    assert all(f"{count} weights are not read, such as model.layers.{first}" in x for x in said)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, f"no tensor '{NAME}'"),
        (np.zeros((32, 31), np.float32), rf"{NAME} in model.safetensors has shape \[32, 31\]"),
        (np.full((32, 32), np.nan, np.float32), f"{NAME} in model.safetensors holds NaN"),
        (np.zeros((32, 32), np.uint8), f"{NAME} in model.safetensors has type uint8"),
    ],
)
def test_a_tensor_that_cannot_be_served_is_named(tmp_path, value, message):
    folder = write(tmp_path)
    rewrite(folder, **{NAME: value})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [
        ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias"),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (7,)])
def test_a_joint_tensor_of_another_shape_is_named(tmp_path, model_type, tensor, shape):
    folder = write_checkpoint(tmp_path, model_type, tokenizer=False)
    rewrite(folder, **{tensor: np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match=tensor):
        load(folder)


def test_a_joint_matrix_that_lies_the_other_way_is_refused(tmp_path):
    folder, name = write_checkpoint(tmp_path, "deepseek_v3"), "model.layers.0.self_attn.kv_b_proj"
    name += ".weight"
    x = load_file(folder / "model.safetensors")[name]
    rewrite(folder, **{name: np.ascontiguousarray(x.T)})
    shapes = [re.escape(str(list(shape))) for shape in (x.T.shape, x.shape)]
    with pytest.raises(CheckpointError, match=rf"{name} .*{shapes[0]}, expected {shapes[1]}"):
        load(folder)


def test_a_config_that_asks_for_more_layers_than_there_are(tmp_path):
    folder = write(tmp_path)
    config = {**hf.read_config(folder), "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.2"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config.json"),
        ("{", "config.json is not JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "model_type None is not supported"),
        ('{"model_type": "bert"}', "model_type 'bert' is not supported"),
        ('{"model_type": "llama"}', "lacks 'num_attention_heads'"),
    ],
)
def test_a_config_that_cannot_be_served_says_why(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_aligned_memory_is_taken_over_by_the_cpu_without_a_copy():
    for shape in ((1,), (3, 5), (100, 7)):
        x = hf.aligned_empty(shape, np.dtype(ml_dtypes.bfloat16))
        assert x.shape == shape
        assert x.ctypes.data % 64 == 0
        x[...] = 1
        taken = jax.device_put(x)
        assert taken.unsafe_buffer_pointer() == x.ctypes.data


def test_resolve_finds_folders_and_explains_what_is_none(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    file = tmp_path / "config.json"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve(file)
    for name in (tmp_path / "nope", "./nope", "a/b/c"):
        with pytest.raises(CheckpointError, match="no folder here"):
            resolve(name)
    for nothing in (None, "", " ", 5):
        with pytest.raises(CheckpointError, match=r"^model=.* must be a model's folder, or its id"):
            resolve(nothing)  # pyright: ignore[reportArgumentType]


MEASURE = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jaxserve.checkpoint import hf
from jaxserve.models.family import family

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

jnp.zeros(8).block_until_ready()
folder = Path(sys.argv[1])
config = hf.read_config(folder)
f = family(config["model_type"])
before = kilobytes("VmRSS")
params = hf.load_params(folder, f, hf.model_config(f, config), jnp.bfloat16, progress=False)
jax.block_until_ready(params)
weights = sum(x.nbytes for x in jax.tree.leaves(params))
print(weights, (kilobytes("VmHWM") - before) * 1024)
"""

LARGE = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("model_type", "dtype", "settings"),
    [
        ("llama", "bfloat16", {"vocab_size": 16384, "num_hidden_layers": 8, "head_dim": 64}),
        ("llama", "float32", {"vocab_size": 16384, "num_hidden_layers": 8, "head_dim": 64}),
        (
            "gpt_oss",
            "bfloat16",
            {
                "vocab_size": 4096,
                "num_hidden_layers": 12,
                "num_local_experts": 8,
                "intermediate_size": 512,
                "head_dim": 64,
            },
        ),
        (
            "gpt_oss",
            "bfloat16",
            {
                "vocab_size": 4096,
                "num_hidden_layers": 12,
                "num_local_experts": 8,
                "intermediate_size": 512,
                "head_dim": 64,
                "quantization_config": MXFP4,
            },
        ),
    ],
)
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, model_type, dtype, settings):
    write_checkpoint(tmp_path, model_type, dtype=dtype, tokenizer=False, **{**LARGE, **settings})
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    weights, peak = map(int, out.split())
    assert weights > 150e6
    assert peak < 1.3 * weights
