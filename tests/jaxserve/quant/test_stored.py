"""Of a checkpoint made for W8A8, what is stored in floats is served in floats."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoint import hf
from jaxserve.models.family import family
from jaxserve.quant.stored import stored_in_int8
from jaxserve.quant.weights import is_large, round_to_int8, weight_bytes
from jaxserve.testing import write_checkpoint
from kernels_pallas.weight import Int8Weight
from tests.jaxserve.checkpoint.test_quantized import W8A8

LAYERS = {"num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 96}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 6, 7]}


def write(folder: Path, floats: str, model_type: str = "llama") -> dict[str, np.ndarray]:
    """A W8A8 checkpoint but for the modules that match; its tensors. No row's largest is 127."""
    said = {**W8A8, "ignore": ["lm_head", f"re:{floats}"]}
    sizes = {**LAYERS, "dtype": "bfloat16", "quantization_config": said}
    write_checkpoint(folder, model_type, tokenizer=False, **sizes)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("proj.weight") and not re.match(floats, n)]:
        x = tensors[name].astype(np.float32)
        scale = (np.abs(x).max(1, keepdims=True) / 110).astype(ml_dtypes.bfloat16)
        tensors[name] = np.rint(x / scale.astype(np.float32)).astype(np.int8)
        tensors[name + "_scale"] = scale
    save_file(tensors, folder / "model.safetensors")
    return tensors


def load(folder: Path, **options):
    """The tree as an engine holds it, and the bytes that were planned for it."""
    raw = hf.read_config(folder)
    module = family(raw["model_type"])
    cfg = hf.model_config(module, raw)
    held = stored_in_int8(folder, module, cfg)
    planned = weight_bytes(module, cfg, "bfloat16", "int8", in_int8=held)
    return hf.load_params(
        folder, module, cfg, "bfloat16", in_int8=held, rounded=round_to_int8, progress=False,
        **options,
    ), planned  # fmt: skip


def bytes_of(params) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(params))


def same_as_stored(w, layer: int, tensors: dict[str, np.ndarray], name: str) -> None:
    stored = tensors[name]
    values = w.values if isinstance(w, Int8Weight) else w
    assert values.dtype == stored.dtype, name
    np.testing.assert_array_equal(np.asarray(values[layer]).reshape(stored.shape), stored)
    if isinstance(w, Int8Weight):
        scale = np.asarray(w.scale[layer]).reshape(-1, 1)
        np.testing.assert_array_equal(scale, tensors[name + "_scale"].astype(np.float32))


def test_modules_that_are_kept_in_floats_stay_so(tmp_path):
    tensors = write(tmp_path, r".*down_proj")
    params, planned = load(tmp_path)
    (stack,) = params.stacks
    for i in range(4):
        at = f"model.layers.{i}."
        same_as_stored(stack.mlp.w_down, i, tensors, at + "mlp.down_proj.weight")
        same_as_stored(stack.mlp.w_up, i, tensors, at + "mlp.up_proj.weight")
    assert isinstance(stack.mlp.w_up, Int8Weight) and not isinstance(stack.mlp.w_down, Int8Weight)
    assert isinstance(params.lm_head, Int8Weight), "rounded while it is loaded"
    assert planned == bytes_of(params)


@pytest.mark.parametrize("unrolled", [False, True])
def test_layers_of_other_kinds_are_other_stacks(tmp_path, unrolled):
    tensors = write(tmp_path, r"model\.layers\.(0|3)\..*")
    params, planned = load(tmp_path, unrolled=unrolled)
    sizes = [len(stack.attn_norm) for stack in params.stacks]
    assert sizes == ([1] * 4 if unrolled else [1, 2, 1])
    layers = [(stack, i) for stack, n in zip(params.stacks, sizes, strict=True) for i in range(n)]
    for i, (stack, at) in enumerate(layers):
        assert isinstance(stack.attn.wo, Int8Weight) == (i in (1, 2))
        same_as_stored(stack.attn.wo, at, tensors, f"model.layers.{i}.self_attn.o_proj.weight")
        same_as_stored(stack.mlp.w_gate, at, tensors, f"model.layers.{i}.mlp.gate_proj.weight")
    assert planned == bytes_of(params)


@pytest.mark.parametrize(
    ("model_type", "floats", "parts"),
    [("llama", r".*2.*v_proj", ("wq", "wk", "wv")), ("qwen3_moe", r".*2.*experts.1.down_proj", ())],
)
def test_weights_of_one_product_are_of_one_kind(tmp_path, caplog, model_type, floats, parts):
    tensors = write(tmp_path, floats, model_type)
    params, planned = load(tmp_path)
    assert [len(stack.attn_norm) for stack in params.stacks] == [2, 1, 1]
    assert ["are held in floats" in r.getMessage() for r in caplog.records] == [True]
    odd = params.stacks[1]
    held = [getattr(odd.attn, name) for name in parts] or jax.tree.leaves(odd.mlp.experts)
    assert {w.dtype.name for w in held} == {"bfloat16"}
    name = f"model.layers.2.{'self_attn.q_proj' if parts else 'mlp.experts.0.down_proj'}.weight"
    want = tensors[name].astype(np.float32) * tensors[name + "_scale"].astype(np.float32)
    found = odd.attn.wq[0] if parts else odd.mlp.experts.w_down[0, 0]
    np.testing.assert_array_equal(
        np.asarray(found).reshape(want.shape), want.astype(ml_dtypes.bfloat16)
    )
    assert planned == bytes_of(params)


def test_asked_for_everything_is_rounded_but_what_is_stored_in_int8(tmp_path):
    tensors = write(tmp_path, r"model\.layers\.0\..*")
    raw = hf.read_config(tmp_path)
    module = family(raw["model_type"])
    params = hf.load_params(
        tmp_path, module, hf.model_config(module, raw), "float32", in_int8=is_large,
        rounded=round_to_int8, progress=False,
    )  # fmt: skip
    (stack,) = params.stacks
    same_as_stored(stack.attn.wo, 2, tensors, "model.layers.2.self_attn.o_proj.weight")
    want = round_to_int8(tensors["model.layers.0.self_attn.o_proj.weight"])
    np.testing.assert_array_equal(stack.attn.wo.values[0], want.values)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_an_engine_serves_them_and_takes_other_weights(tmp_path, quantization):
    write(tmp_path / "a", r"(model\.layers\.0\.|.*down_proj).*")
    other = write_checkpoint(tmp_path / "b", "llama", tokenizer=False, seed=1, **LAYERS)
    settings = {"num_pages": 8, "max_num_seqs": 2, "max_num_batched_tokens": 32}
    with LLM(
        tmp_path / "a", tokenizer=False, progress=False, quantization=quantization, **settings
    ) as llm:
        assert llm.plan.quantization == "int8"
        assert llm.plan.weight_bytes == bytes_of(llm.params)
        kinds = [isinstance(stack.mlp.w_down, Int8Weight) for stack in llm.params.stacks]
        assert kinds == [quantization == "int8"] * len(kinds)
        before = llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids
        raw = hf.read_config(other)
        module = family(raw["model_type"])
        cfg = hf.model_config(module, raw)
        llm.load_params(hf.load_params(other, module, cfg, "float32", progress=False))
        assert llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids != before
        llm.sleep(2)
        llm.wake_up()
        assert llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids == before


def test_blocks_of_int8_are_served_as_floats():
    """There are no products of them, and to round their floats again would lose more."""
    from jaxserve.plan import serves_int8

    said = json.loads(json.dumps(W8A8))
    assert serves_int8({"quantization_config": said})
    said["config_groups"]["group_0"]["weights"] |= {
        "strategy": "block", "block_structure": [16, 32],
    }  # fmt: skip
    assert not serves_int8({"quantization_config": said})
