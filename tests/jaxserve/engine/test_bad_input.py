"""One clear error each, and whoever runs beside it loses nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve import LLM, SamplingParams
from jaxserve.errors import CheckpointError, ConfigError, EngineError, RequestError
from jaxserve.request import RequestOutput, StructuredOutputs
from jaxserve.testing import write_tokenizer
from tests.jaxserve.engine.engines import SETTINGS, checkpoint, serve

POISON = 200
"""A token whose embedding is NaN: whoever is sent it gets no scores."""


def poisonous(**settings: Any) -> LLM:
    """A model with one poisonous token and few pages, which are soon used again."""
    llm = serve(num_pages=24, **settings)
    poisoned = llm.params.embed.at[POISON].set(np.nan)  # no checkpoint with NaN would be loaded
    llm._runner.params = dataclasses.replace(llm.params, embed=poisoned)
    return llm


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with poisonous() as llm:
        yield llm


BYSTANDERS = [[9 + i, 8, 7, 6, 5] for i in range(3)]
SAID = SamplingParams(seed=1, max_tokens=40, ignore_eos=True, logit_bias={POISON: -100.0})


@pytest.fixture(scope="module")
def undisturbed(llm: LLM) -> list[RequestOutput]:
    return llm.generate(BYSTANDERS, SAID)


def beside(llm: LLM, undisturbed: list[RequestOutput], deed: Callable[[], Any]) -> Any:
    """Does something bad while others are being served, who must not notice; returns its result."""
    running = [llm.submit(ids, SAID) for ids in BYSTANDERS]
    done = deed()
    after = [llm.submit(ids, SAID) for ids in BYSTANDERS]
    for generation, want in zip(running + after, undisturbed * 2, strict=True):
        assert generation.result().outputs == want.outputs
    stats = llm.stats()
    assert stats.num_free_pages == stats.num_pages
    return done


PROMPTS: dict[str, tuple[Any, str]] = {
    "empty text": ("", "the prompt is empty"),
    "no tokens": ([[]], "the prompt is empty"),
    "too long": ([list(range(5, 133))], r"128 tokens, the context 128"),
    "far too long": ([[5] * 100_000], r"100000 tokens, the context 128"),
    "beyond the vocabulary": ([[5, 320]], r"token 320; ids go from 0 to 319"),
    "negative": ([[5, -1]], r"token -1; ids go from 0 to 319"),
    "a fraction": ([[5, 1.5]], r"token 1\.5"),
    "a name": ([[5, "x"]], r"token 'x'"),
    "nothing": ([None], r"not NoneType"),
    "a number": ([3.5], r"not float"),
    "a mapping without a prompt": ([{"text": "a"}], r"not dict"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_cannot_be_served(llm: LLM, undisturbed: list[RequestOutput], name: str):
    prompt, message = PROMPTS[name]

    def deed() -> None:
        finished = llm.stats().requests_total
        for call in (llm.generate, llm.encode, lambda p: next(llm.stream(p[0] if p else p))):
            if name == "too long" and call == llm.encode:
                continue  # it fits: nothing is generated behind it
            with pytest.raises(RequestError, match=message) as raised:
                call(prompt)
            assert raised.value.param == "prompt"
        with pytest.raises(RequestError, match=message):
            llm.generate([[5, 6], *(prompt or [""])])
        started = llm.stats().requests_total
        assert started.keys() - finished.keys() <= {"length"}, "none of a refused batch is begun"

    beside(llm, undisturbed, deed)


PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens": ({"max_tokens": 10**9}, r"max_tokens=1000000000 .* at most 125"),
    "stop_token_ids": ({"stop_token_ids": [5, 320]}, "stop_token_ids names token 320"),
    "logit_bias": ({"logit_bias": {-1: 1.0}}, "logit_bias names token -1"),
    "many biases": ({"logit_bias": dict.fromkeys(range(300), 1.0) | {10**9: 1.0}}, "logit_bias"),
}


@pytest.mark.parametrize("name", PARAMS)
def test_a_parameter_that_the_model_cannot_honour(
    llm: LLM, undisturbed: list[RequestOutput], name: str
):
    fields, message = PARAMS[name]

    def deed() -> None:
        with pytest.raises(RequestError, match=message) as raised:
            llm.generate([[5, 6, 7]], SamplingParams(**fields))
        assert raised.value.param in fields

    beside(llm, undisturbed, deed)


# ---- what only shows while it runs ------------------------------------------------------------


BROKEN = [[POISON], [9, 8, 7, 6, POISON], [9, 8, POISON, *range(5, 45)]]


def poison(llm: LLM, params: SamplingParams) -> list[str]:
    """What is said to requests without scores."""
    said = []
    for prompt in BROKEN:
        for ask in (lambda p: llm.generate([p], params), lambda p: llm.embed([p], "last")):
            with pytest.raises(EngineError) as raised:
                ask(prompt)
            said.append(str(raised.value))
    return said


@pytest.mark.parametrize("params", [{}, {"n": 3}, {"temperature": 0.0}, {"logprobs": 2}])
def test_scores_that_are_not_finite_end_their_request_alone(
    llm: LLM, undisturbed: list[RequestOutput], params: dict[str, Any]
):
    """And the pages that it leaves behind hurt nobody: all have been poisoned in the end."""
    for _ in range(3):
        said = beside(llm, undisturbed, lambda: poison(llm, SamplingParams(**params)))
        assert all(re.search("NaN or infinite .*check the weights", text) for text in said)


@pytest.mark.slow
def test_pages_of_a_request_without_scores_hurt_nobody_on_plain_xla():
    with poisonous(kernels="reference") as llm:
        undisturbed = llm.generate(BYSTANDERS, SAID)
        for _ in range(3):
            said = beside(llm, undisturbed, lambda: poison(llm, SamplingParams()))
            assert all("NaN or infinite" in text for text in said)


PREFIX = [7, *range(20, 31)]
"""A full page, and the poisonous token behind it in the same step."""


def check_prefix_is_forgotten(llm: LLM) -> None:
    """In its page NaN may have come to tokens before the broken one, in all layers but the first:
    it must serve nobody who shares the prefix alone."""
    greedy = SamplingParams(temperature=0.0, max_tokens=5, logit_bias={POISON: -100.0})
    good = [*PREFIX, 9, 8, 7]
    want = llm.generate([good], greedy)[0].outputs
    for ask in (
        lambda: llm.generate([[*PREFIX, POISON, 3]], greedy),
        lambda: llm.generate([[*PREFIX, POISON, 3]], SamplingParams(n=2)),
        lambda: llm.embed([[*PREFIX, POISON, 3]], "last"),
    ):
        llm.reset_prefix_cache()
        with pytest.raises(EngineError, match="NaN or infinite"):
            ask()
        assert llm.generate([good], greedy)[0].outputs == want


def test_a_prefix_before_a_broken_token_is_forgotten(llm: LLM):
    check_prefix_is_forgotten(llm)


@pytest.mark.slow
def test_a_prefix_before_a_broken_token_is_forgotten_on_plain_xla():
    with poisonous(kernels="reference") as llm:
        check_prefix_is_forgotten(llm)


def test_a_step_that_raises_ends_what_it_served(
    llm: LLM, undisturbed: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
):
    launch, calls = llm._runner.launch, []

    def fail_once(step: Any) -> Any:
        calls.append(step)
        if len(calls) == 5:
            raise RuntimeError("the device is on fire")
        return launch(step)

    monkeypatch.setattr(llm._runner, "launch", fail_once)
    running = [llm.submit(ids, SAID) for ids in BYSTANDERS]
    for generation in running:
        with pytest.raises(EngineError, match="on fire"):
            generation.result()
    beside(llm, undisturbed, lambda: None)


def test_a_name_in_use(llm: LLM, undisturbed: list[RequestOutput]):
    def deed() -> None:
        first = llm.submit([5, 6], SAID, request_id="mine")
        second = llm.submit([5, 6], SAID, request_id="mine")
        with pytest.raises(RequestError, match="mine"):
            second.result()
        assert first.result().finished

    beside(llm, undisturbed, deed)


# ---- models and settings ----------------------------------------------------------------------


def test_an_engine_without_a_tokenizer_takes_ids_only():
    with serve(tokenizer=False) as llm:
        for params in (
            SamplingParams(stop="a"),
            SamplingParams(structured_outputs=StructuredOutputs(regex="a")),
        ):
            with pytest.raises(RequestError, match="token"):
                llm.generate([[5, 6]], params)
        with pytest.raises(RequestError, match="token ids"):
            llm.generate("text")
        (out,) = llm.generate([5, 6], SamplingParams(max_tokens=4, ignore_eos=True, logprobs=1))
        assert len(out.outputs[0].token_ids) == 4


def start(folder: Any, **settings: Any) -> None:
    LLM(folder, **{**SETTINGS, **settings})


def copied(tmp_path: Path, **config: Any) -> Path:
    shutil.copytree(checkpoint(), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return tmp_path


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no-such-model"):
        start(tmp_path / "no-such-model")


def test_a_folder_without_a_model(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        start(tmp_path)


def test_an_unknown_architecture(tmp_path: Path):
    with pytest.raises(CheckpointError, match="mamba17"):
        start(copied(tmp_path, model_type="mamba17"))


def test_a_tokenizer_of_another_model(tmp_path: Path):
    folder = copied(tmp_path)
    write_tokenizer(folder, 2000, adds_bos=False)
    with pytest.raises(CheckpointError, match=r"vocabulary is 320.*tokenizer"):
        start(folder)


def test_weights_that_are_not_finite(tmp_path: Path):
    folder = copied(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*NaN"):
        start(folder)


def test_an_unknown_setting():
    with pytest.raises(ConfigError, match=r"'max_length'.*max_model_len"):
        start(checkpoint(), max_length=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pages": 10**9}, r"num_pages=1000000000 .*nearest.* num_pages=\d+"),
        ({"num_pages": 4}, r"max_model_len=128 .*nearest.* max_model_len=32"),
        ({"max_model_len": 10**6}, r"max_model_len=1000000 .*2048"),
        ({"max_num_seqs": 0}, r"max_num_seqs=0 must be"),
        ({"page_size": 24}, r"page_size=24 must be a power of two"),
        ({"memory_utilization": 1e-9}, r"memory_utilization=1e-09 .*nearest"),
    ],
)
def test_an_impossible_setting_names_the_nearest(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        start(checkpoint(), **settings)


def test_a_failed_start_leaves_no_thread():
    import threading

    before = threading.active_count()
    with pytest.raises(ConfigError):
        start(checkpoint(), num_pages=4)
    assert threading.active_count() == before


def test_a_vocabulary_larger_than_the_tokenizers(tmp_path: Path):
    """Padding of the embedding: its tokens can be drawn, and add no text."""
    folder = copied(tmp_path)
    write_tokenizer(folder, 300, adds_bos=False)
    with serve(folder) as llm:
        assert llm.tokenizer is not None
        assert llm.tokenizer.vocab_size == 300
        (out,) = llm.generate("a", SamplingParams(max_tokens=3, logit_bias={310: 100.0}))
        assert (out.outputs[0].token_ids, out.outputs[0].text) == ([310] * 3, "")
        digits = StructuredOutputs(regex="[0-9]{3}")
        (out,) = llm.generate(
            "a", SamplingParams(structured_outputs=digits, logit_bias={310: 100.0})
        )
        assert out.outputs[0].text.isdigit()


def test_a_platforms_name_is_no_device():
    with pytest.raises(
        ConfigError, match=r"device='cpu' must be a device .* jax\.devices\(\)\[0\]"
    ):
        LLM(str(checkpoint("qwen3")), device="cpu", progress=False)
