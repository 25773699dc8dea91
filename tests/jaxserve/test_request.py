"""Parameters out of range, or of the wrong kind, are refused by name and before anything runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import SamplingParams
from jaxserve.errors import RequestError
from jaxserve.intake import as_prompts, per_prompt
from jaxserve.request import StructuredOutputs

WRONG: list[tuple[str, list[Any]]] = [
    ("n", [0, -1, 1025, 10**9, 1.5, "2", None, [1]]),
    ("temperature", [-0.1, math.nan, math.inf, 101, 1e30, "hot", None, [1.0]]),
    ("top_p", [0, 0.0, -1, 1.01, math.nan, "0.5", None]),
    ("top_k", [-2, 2**31, 1.5, math.nan, "40", None]),
    ("min_p", [-0.1, 1.1, math.nan, "0", None]),
    ("seed", [2**64, -(2**63) - 1, 1.5, "7", math.nan]),
    ("stop", ["", [""], [1], ["a", None], 5, [b"a"]]),
    ("stop_token_ids", [["a"], [1.5], 5, [None], "12"]),
    ("include_stop_str_in_output", ["yes", 2, None]),
    ("max_tokens", [0, -1, 1.5, "9", math.inf]),
    ("min_tokens", [-1, 1.5, "9", None]),
    ("logprobs", [-1, 21, 1.5, "3"]),
    ("prompt_logprobs", [-1, 21, 1.5, "3"]),
    ("logit_bias", [{1: math.nan}, {1: math.inf}, {1: "x"}, {"a": 1}, [1], 5, {1.5: 1}, {1: None}]),
    ("presence_penalty", [-2.1, 2.1, math.nan, "1", None]),
    ("frequency_penalty", [-2.1, 2.1, math.nan, "1", None]),
    ("repetition_penalty", [0, -1, 101, math.nan, "1", None]),
    ("ignore_eos", ["no", 2, None]),
    ("skip_special_tokens", ["no", 2, None]),
    ("structured_outputs", [{"regex": "a"}, "a", 5]),
]
CASES = [(name, value) for name, values in WRONG for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n}={v!r}" for n, v in CASES])
def test_what_cannot_be_honoured_is_refused_by_name(name: str, value: Any):
    with pytest.raises(RequestError, match=name) as raised:
        SamplingParams(**{name: value})
    assert raised.value.param == name


@pytest.mark.parametrize("prompts", [5, None, object(), 1.5])
def test_what_is_no_prompt_is_refused(prompts: Any):
    with pytest.raises(RequestError, match=r"^prompts are of type .*; give text, token ids"):
        as_prompts(prompts)


@pytest.mark.parametrize("params", [{"max_tokens": 2}, "greedy", [{"max_tokens": 2}], 5])
def test_what_is_no_sampling_params_is_refused(params: Any):
    with pytest.raises(RequestError, match=r"^sampling_params are .*; give SamplingParams\(...\)"):
        per_prompt(params, 1)


def test_every_parameter_is_checked():
    assert {name for name, _ in WRONG} == set(SamplingParams.__dataclass_fields__)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
            | st.lists(st.integers() | st.text(max_size=2), max_size=2)
            for name in SamplingParams.__dataclass_fields__
        },
    )
)  # fmt: skip
@settings(max_examples=400, deadline=None, derandomize=True)
def test_anything_is_accepted_or_refused(fields: dict[str, Any]):
    try:
        SamplingParams(**fields)
    except RequestError as error:
        assert error.param in fields


def test_defaults_follow_vllm_and_are_normalised():
    p = SamplingParams(stop="end", top_k=-1, logit_bias={"5": 1}, stop_token_ids=[3])  # type: ignore[dict-item]
    assert (p.stop, p.top_k, p.logit_bias, p.stop_token_ids) == (("end",), 0, {5: 1.0}, (3,))
    assert SamplingParams().max_tokens is None
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy


def test_min_tokens_may_not_exceed_max_tokens():
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(min_tokens=6, max_tokens=5)


@pytest.mark.parametrize(
    "fields",
    [{}, {"json": "{}", "regex": "a"}, {"regex": ""}, {"choice": []}, {"choice": "abc"}],
)
def test_structured_outputs_take_one_constraint(fields: dict[str, Any]):
    with pytest.raises(RequestError, match="structured_outputs"):
        StructuredOutputs(**fields)


def test_an_empty_schema_is_a_schema():
    assert StructuredOutputs(json={}).json == {}
