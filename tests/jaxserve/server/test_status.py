"""Models, tokens, embeddings, load and metrics."""

import math
import struct

import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve import __version__
from jaxserve.errors import ConfigError
from jaxserve.server.app import create_app
from jaxserve.server.state import Limits
from tests.jaxserve.server.fake_llm import FakeLLM

MODEL = "fake/model"


def metrics(http):
    """Values by name and the label that tells them apart, if any."""
    found = {}
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == MODEL
            found[(sample.name, *sample.labels.values())] = sample.value
    return found


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", 4096)
    assert client.models.retrieve(MODEL).id == MODEL


def test_version_health_load(http):
    assert http.get("/version").json() == {"version": __version__}
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/load").json() == {
        "server_load": 0,
        "num_running": 0,
        "num_waiting": 0,
        "free_pages": 1000,
        "pages": 1000,
    }


def test_metrics_count_what_happened(live, http, client):
    before = metrics(http)
    live.llm.delay = 0.002
    client.completions.create(model=MODEL, prompt="hello", n=2, max_tokens=8)
    list(client.completions.create(model=MODEL, prompt="x", max_tokens=4, stream=True))
    after = metrics(http)

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("jaxserve:prompt_tokens_total") == 6
    assert grown("jaxserve:generation_tokens_total") == 20
    assert grown("jaxserve:request_success_total", "length") == 3
    assert grown("jaxserve:time_to_first_token_seconds_count") == 2
    assert grown("jaxserve:inter_token_latency_seconds_count") == 2 * 7 + 3
    assert grown("jaxserve:e2e_request_latency_seconds_count") == 2
    assert grown("jaxserve:request_prompt_tokens_sum") == 6
    assert grown("jaxserve:request_generation_tokens_sum") == 20
    assert grown("jaxserve:inter_token_latency_seconds_sum") >= 0.002 * 5
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [after[(f"jaxserve:{name}",)] for name in gauges] == [0, 0, 0]
    assert after[("jaxserve:kv_cache_pages",)] == 1000
    assert after[("jaxserve:compiled_programs",)] == 2


def test_two_apps_do_not_mix():
    a, b = create_app(FakeLLM()), create_app(FakeLLM())
    a.state.server.metrics.count("stop")
    assert b'finished_reason="stop"' in a.state.server.metrics.render()
    assert b'finished_reason="stop"' not in b.state.server.metrics.render()


def test_tokens_there_and_back(http):
    got = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"]) == 3
    assert got["max_model_len"] == 4096
    assert http.post("/detokenize", json={"tokens": got["tokens"]}).json() == {"prompt": "hé"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}]
)
def test_tokenize_wants_one_input(http, body):
    assert http.post("/tokenize", json=body).status_code == 400


def test_an_id_outside_the_vocabulary_is_named(http):
    error = http.post("/detokenize", json={"tokens": [1, 259]}).json()["error"]
    assert error["param"] == "tokens[1]"


def test_tokenizer_info_serves_lm_evals_remote_tokenizer(http):
    info = http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["vocab_size"]) == ("<|im_end|>", None, 259)
    assert "add_generation_prompt" in info["chat_template"]
    eos = http.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False})
    assert eos.json()["tokens"] == info["eos_token_ids"]


def test_embeddings_by_every_input(client):
    as_text = client.embeddings.create(model=MODEL, input="hi", encoding_format="float")
    as_ids = client.embeddings.create(model=MODEL, input=[71, 72], encoding_format="float")
    assert as_text.data == as_ids.data
    assert as_text.usage.prompt_tokens == 2
    both = client.embeddings.create(model=MODEL, input=["hi", "hello"])  # the client asks base64
    assert [d.index for d in both.data] == [0, 1]
    assert np.allclose(both.data[0].embedding, as_text.data[0].embedding)


def test_embeddings_in_base64_are_float32(http):
    asked = {"input": "hi", "encoding_format": "base64"}
    packed = http.post("/v1/embeddings", json=asked).json()["data"][0]["embedding"]
    import base64

    assert struct.unpack("<4f", base64.b64decode(packed))[0] == 2.0
    mean = http.post("/v1/embeddings", json={"input": "hi", "pooling": "mean"}).json()
    assert math.isclose(mean["data"][0]["embedding"][0], 4.0)


def test_dimensions_are_honoured_or_refused(client):
    client.embeddings.create(model=MODEL, input="hi", dimensions=4)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="hi", dimensions=3)
    assert caught.value.param == "dimensions"


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="max_body_bytes=0"):
        Limits(max_body_bytes=0)
    llm = FakeLLM()
    llm.tokenizer = None
    with pytest.raises(ConfigError, match="tokenizer"):
        create_app(llm)
