"""Reads `config.json` strictly: a setting that nothing here honours is refused, never ignored."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxserve.errors import CheckpointError

T = TypeVar("T")

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's name of an activation -> its key in `kernels_pallas.linear.GATES`."""


def choice(hf: Mapping[str, Any], key: str, known: Mapping[Any, T], default: Any) -> T:
    """What the value of `key` stands for in `known`; a dotted key looks into a sub-object.

    Raises:
        CheckpointError: it is none of `known`.
    """
    at: Any = hf
    *outer, last = key.split(".")
    for name in outer:
        at = at.get(name) or {}
    value = at.get(last, default)
    if not isinstance(value, Hashable) or value not in known:
        names = ", ".join(repr(name) for name in known)
        raise CheckpointError(f"{key} {value!r} in config.json is not supported; known: {names}")
    return known[value]


EIGHT_BITS = ("compressed-tensors", "fp8", "fbgemm_fp8", "modelopt")
"""Quantisations that `checkpoint.quantized` reads as floats, for any family."""


def refuse_quantized(hf: Mapping[str, Any], supported: tuple[str, ...] = EIGHT_BITS) -> str | None:
    """The checkpoint's `quant_method`; CheckpointError unless it is None or one of `supported`."""
    config = hf.get("quantization_config") or {}
    method = config.get("quant_method")
    if method in supported or not config:
        return method
    known = ", ".join(map(repr, supported))
    raise CheckpointError(
        f"quantization_config.quant_method {method!r} in config.json is not supported; known: "
        f"{known}. Take the checkpoint in floats, and quantization='int8'"
    )


# ---- what a value may be -------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What may stand behind a key of config.json.

    Attributes:
        expected: in words, behind "must be".
        fits: whether a value that is not null is such.
    """

    expected: str
    fits: Callable[[Any], bool]


def check(hf: Mapping[str, Any]) -> None:
    """Refuses values that no family could read; a family calls it before it reads any.

    Keys that have no rule, and null, which is as good as no key, are passed over.

    Raises:
        CheckpointError: it names the key, its value, what was expected and the remedy.
    """
    _check_values(hf)
    _check_experts(hf)
    kinds, n = hf.get("layer_types"), hf.get("num_hidden_layers")
    if kinds is not None and n is not None and len(kinds) != n:
        raise _refused(
            "layer_types",
            f"lists {len(kinds)} layers",
            f"have one entry for each of num_hidden_layers {n}",
        )


def _check_values(hf: Mapping[str, Any], inside: str = "") -> None:
    rules = {**RULES, **ROPE_RULES} if inside else RULES
    for key, value in hf.items():
        name, rule = f"{inside}{key}", rules.get(key)
        if rule is not None and value is not None and not rule.fits(value):
            raise _refused(name, reprlib.repr(value), f"be {rule.expected}")
        if isinstance(value, Mapping) and name.startswith(("rope_scaling", "rope_parameters")):
            _check_values(value, f"{name}.")  # and those of each type of layer


def _check_experts(hf: Mapping[str, Any]) -> None:
    """Refuses routing to more experts, or groups, than there are."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (experts := hf.get(key)) is None:
            continue
        if (chosen := hf.get("num_experts_per_tok") or 1) > experts:
            raise _refused("num_experts_per_tok", chosen, f"be at most {key} {experts}")
        if experts % (groups := hf.get("n_group") or 1):
            raise _refused("n_group", groups, f"divide {key} {experts}")
        if (best := hf.get("topk_group") or 1) > groups:
            raise _refused("topk_group", best, f"be at most n_group {groups}")


def _refused(name: str, seen: Any, must: str) -> CheckpointError:
    return CheckpointError(
        f"{name} {seen} in config.json: it must {must}; correct it, or fetch the checkpoint's "
        "config.json again"
    )


def _is_whole(value: Any) -> bool:
    return type(value) is int  # True is an int as well


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(fits, value))


_COUNT = Rule("a whole number, 1 or more", lambda v: _is_whole(v) and v >= 1)
_WHOLE = Rule("a whole number, 0 or more", lambda v: _is_whole(v) and v >= 0)
_POSITIVE = Rule("a number above 0", lambda v: _is_number(v) and v > 0)
_NUMBER = Rule("a number, 0 or more", lambda v: _is_number(v) and v >= 0)
_BASE = Rule("a number above 1", lambda v: _is_number(v) and v > 1)
_SHARE = Rule("a number above 0, at most 1", lambda v: _is_number(v) and 0 < v <= 1)
_FLAG = Rule("true or false", lambda v: isinstance(v, bool))
_TEXT = Rule("a text", lambda v: isinstance(v, str))
_OBJECT = Rule("an object", lambda v: isinstance(v, Mapping))


def _by_key(keys: Mapping[Rule, str]) -> dict[str, Rule]:
    return {key: rule for rule, names in keys.items() for key in names.split()}


RULES = _by_key({
    _COUNT: """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers
        num_attention_heads num_key_value_heads head_dim max_position_embeddings
        num_local_experts num_experts n_routed_experts num_experts_per_tok n_group topk_group
        decoder_sparse_step sliding_window_pattern kv_lora_rank qk_nope_head_dim qk_rope_head_dim
        v_head_dim""",
    _WHOLE: """sliding_window max_window_layers q_lora_rank n_shared_experts
        first_k_dense_replace""",
    _POSITIVE: "rms_norm_eps routed_scaling_factor query_pre_attn_scalar",
    _NUMBER: "final_logit_softcapping",
    _BASE: "rope_theta rope_local_base_freq",
    _SHARE: "partial_rotary_factor",
    _FLAG: """tie_word_embeddings attention_bias mlp_bias use_sliding_window norm_topk_prob
        rope_interleave""",
    _OBJECT: "rope_scaling rope_parameters quantization_config",
    Rule("a list of texts", _are(_TEXT.fits)): "layer_types",
    Rule("a list of whole numbers, 0 or more", _are(_WHOLE.fits)): "mlp_only_layers",
})  # fmt: skip
"""Every key whose value some family computes with."""

ROPE_RULES = _by_key({
    _TEXT: "rope_type type",
    _COUNT: "original_max_position_embeddings",
    _POSITIVE: "factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor",
    _NUMBER: "mscale mscale_all_dim",
    _FLAG: "truncate",
})  # fmt: skip
"""The same for what stands in `rope_scaling` and `rope_parameters`."""
