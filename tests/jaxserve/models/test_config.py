"""A config.json is honoured or refused by name; nothing in it is passed over."""

import itertools
import math
import reprlib

import numpy as np
import pytest

from jaxserve.checkpoint.hf import model_config
from jaxserve.errors import CheckpointError
from jaxserve.models import llama
from jaxserve.models.family import family
from jaxserve.models.rope import from_hf
from tests.jaxserve.models import hf_cases
from tests.jaxserve.models.hf_cases import CASES, FAMILIES


def read(name, **changes):
    c = {**hf_cases.config(name), **changes}
    return model_config(family(c["model_type"]), c)


@pytest.mark.parametrize("name", CASES)
def test_config_is_hashable_and_says_how_large_the_cache_is(name):
    cfg = read(name)
    assert hash(cfg) == hash(read(name))
    assert cfg.num_layers == hf_cases.config(name)["num_hidden_layers"]
    assert len(cfg.kv_shape) == 3
    assert cfg.sizes["vocab"] == hf_cases.VOCAB


def test_latent_cache_keeps_one_row_per_token():
    cfg = read("deepseek_v3")
    assert cfg.kv_shape == (1, 32 + 8, 0)


LLAMA3 = hf_cases.config("llama")["rope_scaling"]
REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ("llama", {"quantization_config": {"quant_method": "mxfp4"}}, "quant_method 'mxfp4'"),
    ("qwen3-layer-types", {"layer_types": ["full_attention"]}, "layer_types lists 1"),
    ("qwen3-layer-types", {"layer_types": ["full_attention"] * 2 + ["odd"]}, "layer_types 'odd'"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window must be positive"),
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 .* num_local_experts 4"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy'"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    ("deepseek_v3", {"n_group": 3}, "n_group 3 .* divide n_routed_experts 8"),
    ("deepseek_v3", {"topk_group": 5}, "topk_group 5 .* at most n_group 4"),
    ("deepseek_v3", {"n_routed_experts": 4}, "top_k must be within"),
    ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0 must be"),
    ("llama", {"head_dim": 15}, "15 lanes .* head_dim"),
    ("llama", {"partial_rotary_factor": 0.01}, "0 lanes .* partial_rotary_factor"),
    ("deepseek_v2", {"qk_rope_head_dim": 7}, "7 lanes .* qk_rope_head_dim"),
    ("llama", {"hidden_size": 3, "num_attention_heads": 4}, "0 lanes"),
    ("deepseek_v3", {"kv_lora_rank": None}, "lacks 'kv_lora_rank'"),
    ("llama", {"hidden_act": ["silu"]}, r"hidden_act \['silu'\]"),
    ("gemma3_text", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha 1.0"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'"),
    ("llama", {"quantization_config": {"bits": 4, "group_size": 64}}, "quant_method None"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_settings_that_nothing_honours_are_refused(name, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(name, **changes)


MALFORMED = [
    ("hidden_size", "64", "a whole number, 1 or more"),
    ("hidden_size", 64.0, "a whole number"),
    ("vocab_size", 320.5, "a whole number"),
    ("vocab_size", True, "a whole number"),
    ("intermediate_size", [96], "a whole number"),
    ("num_hidden_layers", 0, "1 or more"),
    ("num_attention_heads", 0, "1 or more"),
    ("num_attention_heads", {}, "a whole number"),
    ("num_key_value_heads", -2, "1 or more"),
    ("head_dim", -1, "1 or more"),
    ("head_dim", 0, "1 or more"),
    ("max_position_embeddings", "4k", "a whole number"),
    ("num_experts_per_tok", 0, "1 or more"),
    ("sliding_window", -1, "0 or more"),
    ("sliding_window", "all", "a whole number"),
    ("rms_norm_eps", "1e-5", "a number above 0"),
    ("rms_norm_eps", 0, "a number above 0"),
    ("rms_norm_eps", math.nan, "a number above 0"),
    ("rope_theta", "x", "a number above 1"),
    ("rope_theta", -1e4, "a number above 1"),
    ("rope_theta", math.inf, "a number above 1"),
    ("partial_rotary_factor", 1.5, "at most 1"),
    ("tie_word_embeddings", "false", "true or false"),
    ("attention_bias", 1, "true or false"),
    ("quantization_config", "fp8", "an object"),
    ("rope_scaling", "linear", "an object"),
    ("rope_scaling", {"factor": "8"}, "a number above 0"),
    ("rope_scaling", {"rope_type": ["yarn"]}, "a text"),
    ("rope_parameters", {"full_attention": {"rope_theta": "x"}}, "a number above 1"),
    ("layer_types", "full_attention", "a list of texts"),
    ("layer_types", [1, 2, 3], "a list of texts"),
    ("layer_types", ["full_attention"] * 7, "num_hidden_layers 3"),
    ("layer_types", [], "num_hidden_layers 3"),
    ("mlp_only_layers", ["0"], "a list of whole numbers"),
]


@pytest.mark.parametrize(("key", "value", "expected"), MALFORMED)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_malformed_value_is_refused_by_its_key(name, key, value, expected):
    with pytest.raises(CheckpointError) as caught:
        read(name, **{key: value})
    message = str(caught.value)
    place = f"{key}.full_attention.rope_theta" if key == "rope_parameters" else key
    assert message.startswith(place)
    at_fault = next(iter(value.values())) if isinstance(value, dict) and value else value
    seen = f"lists {len(value)} layers" if "num_hidden" in expected else reprlib.repr(at_fault)
    assert seen in message or key == "rope_parameters"
    assert f"must {'have one' if 'num_hidden' in expected else 'be'} " in message
    assert expected in message
    assert "in config.json" in message
    assert "correct it" in message


WRONG = ["x", "", -1, 0, 1, 2**20, 1.5, math.nan, True, [], ["x"], [-1], {}, {"x": 1}]


@pytest.mark.parametrize("name", CASES)
def test_no_value_of_any_key_fails_but_by_its_name(name):
    """One key at a time holds something odd: it is read, or refused by a message that names it."""
    c = hf_cases.config(name)
    unread = {"model_type", "bos_token_id", "eos_token_id", "num_hidden_layers"}
    for key in c.keys() - unread:
        for value in WRONG:
            try:
                read(name, **{key: value})
            except CheckpointError as error:
                assert _names(str(error), key), f"{key}={value!r}: {error}"


@pytest.mark.parametrize("name", [n for n in CASES if "rope_scaling" in CASES[n]])
def test_no_value_of_rope_scaling_fails_but_by_its_name(name):
    scaling = hf_cases.config(name)["rope_scaling"]
    for key, value in itertools.product(scaling or (), WRONG):
        try:
            read(name, rope_scaling={**scaling, key: value})
        except CheckpointError as error:
            assert key.removeprefix("rope_") in str(error), f"{key}={value!r}: {error}"


def _names(message, key):
    """Whether a message names a key, or the two numbers of groups in the router's own words."""
    return key in message or (key == "topk_group" and "top_groups" in message)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantised_checkpoint_is_refused(name):
    with pytest.raises(CheckpointError, match=r"quantization_config.quant_method 'awq'"):
        read(name, quantization_config={"quant_method": "awq"})


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "rms_norm_eps"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_key_is_named(name, key):
    c = {k: v for k, v in hf_cases.config(name).items() if k != key}
    with pytest.raises(CheckpointError, match=f"{name}' lacks '{key}'"):
        model_config(family(name), c)


@pytest.mark.parametrize("model_type", ["gpt2", None, ""])
def test_an_unknown_family_is_named_with_the_known_ones(model_type):
    with pytest.raises(CheckpointError, match=rf"{model_type!r} is not supported.*llama"):
        family(model_type)


def test_windows_in_each_spelling():
    n = {"num_hidden_layers": 4, "sliding_window": 8}
    kinds = ["full_attention", "sliding_attention"] * 2
    assert llama.windows({**n, "layer_types": kinds}) == (0, 8, 0, 8)
    assert llama.windows({**n, "max_window_layers": 3}) == (0, 0, 0, 8)
    assert llama.windows({**n, "use_sliding_window": False}) == (0,) * 4
    assert llama.windows(n, full_every=2) == (8, 0, 8, 0)
    assert llama.windows({**n, "sliding_window": None}) == (0,) * 4


def test_rope_of_each_kind_by_its_formula():
    plain = np.array(from_hf({"rope_theta": 100.0}, 8).inv_freq)
    np.testing.assert_allclose(plain, 100.0 ** -(np.arange(4) / 4), rtol=1e-6)
    linear = from_hf({"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4}}, 8)
    np.testing.assert_allclose(linear.inv_freq, plain / 4, rtol=1e-6)
    half = from_hf({"rope_theta": 100.0, "partial_rotary_factor": 0.5}, 8)
    assert len(half.inv_freq) == 2


def test_deepseeks_yarn_scales_scores_and_not_vectors():
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    rope = from_hf({"rope_scaling": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}}, 64)
    assert rope.magnitude == 1.0
    assert rope.score_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert from_hf({"rope_scaling": yarn}, 64).magnitude == pytest.approx(0.1 * math.log(40) + 1)
