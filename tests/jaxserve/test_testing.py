"""The checkpoints that other tests start from are what transformers itself would load."""

import json
from math import prod

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from jaxserve.testing import (
    BENCH_SHAPES,
    FAMILIES,
    MXFP4,
    family_config,
    write_checkpoint,
    write_tokenizer,
)

VARIANTS = [
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ("deepseek_v2", {"q_lora_rank": None}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 0}),
    ("gpt_oss", {"quantization_config": MXFP4}),
]


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize(("model_type", "overrides"), [*((f, {}) for f in FAMILIES), *VARIANTS])
def test_transformers_loads_every_weight_and_greedy_text_varies(tmp_path, model_type, overrides):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if "quantization_config" in overrides:
        pytest.importorskip("accelerate")  # transformers asks for it to read MXFP4
    torch.set_num_threads(1)  # tiny products gain nothing, and waiting threads spin
    write_checkpoint(tmp_path, model_type, **overrides)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not {key: found for key, found in report.items() if found}
    prompts = torch.from_numpy(np.random.default_rng(0).integers(5, 320, (4, 16)))
    text = model.generate(prompts, max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert np.median([len(set(row[16:].tolist())) for row in text]) > 12


@pytest.mark.filterwarnings("default")
def test_both_spellings_of_rope_are_one_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    old = family_config("llama", rope_theta=5000.0, rope_scaling=rope)
    new = family_config("llama", rope_parameters={**rope, "rope_theta": 5000.0})
    assert "rope_theta" not in new
    read = [transformers.LlamaConfig(**c).rope_parameters for c in (old, new)]
    assert read[0] == read[1]


def test_shards_hold_the_same_weights_and_an_index(tmp_path):
    whole = load_file(write_checkpoint(tmp_path / "one", "qwen3") / "model.safetensors")
    folder = write_checkpoint(tmp_path / "three", "qwen3", shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    parts = {f.name: load_file(f) for f in files}
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in whole.values())
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[index["weight_map"][name]][name])


def test_a_value_depends_on_seed_and_name_only(tmp_path):
    def weights(name, **settings):
        return load_file(
            write_checkpoint(tmp_path / name, "llama", **settings) / "model.safetensors"
        )

    a, same, deeper = weights("a"), weights("b"), weights("c", num_hidden_layers=4)
    other = weights("d", seed=1)
    for name, array in a.items():
        np.testing.assert_array_equal(array, same[name])
        np.testing.assert_array_equal(array, deeper[name])
        assert (array != other[name]).any()


@pytest.mark.parametrize(("dtype", "code"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_weights_are_stored_in_the_dtype_that_config_names(tmp_path, dtype, code):
    folder = write_checkpoint(tmp_path, "deepseek_v3", dtype=dtype)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    with safe_open(folder / "model.safetensors", "np") as f:
        codes = {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118
    router_bias = {name for name in codes if name.endswith("e_score_correction_bias")}
    assert {codes[name] for name in router_bias} == {"F32"}
    assert {codes[name] for name in codes.keys() - router_bias} == {code}


@pytest.mark.parametrize("adds_bos", [True, False])
def test_tokenizer_fits_the_vocabulary_and_round_trips(tmp_path, adds_bos):
    write_tokenizer(tmp_path, 320, adds_bos)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 320
    text = "naïve 東京 🙂\n\tdef f(x): return {'a': 1}"
    ids = tokenizer.encode(text).ids
    assert (ids[0] == tokenizer.token_to_id("<|bos|>")) == adds_bos
    assert tokenizer.decode(ids) == text


def test_tokenizer_is_deterministic_and_grows_with_the_vocabulary(tmp_path):
    sizes = (2000, 2000, 16384)
    files = []
    for i, size in enumerate(sizes):
        (tmp_path / str(i)).mkdir()
        write_tokenizer(tmp_path / str(i), size, adds_bos=False)
        files.append(tmp_path / str(i) / "tokenizer.json")
    assert files[0].read_bytes() == files[1].read_bytes()
    assert Tokenizer.from_file(str(files[2])).get_vocab_size() == 16384


def test_chat_template_renders(tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    write_tokenizer(tmp_path, 320, adds_bos=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = jinja2.Template(config["chat_template"])
    hello = [{"role": "user", "content": "hi"}]
    rendered = template.render(messages=hello, bos_token="<|bos|>", add_generation_prompt=True)
    assert rendered == "<|bos|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "millions"),
    [("qwen3-120m", 119.6), ("qwen3-0.6b", 596.0), ("qwen3-moe-166m", 165.8)],
)
def test_benchmark_shapes_have_the_documented_size(name, millions):
    model_type, overrides = BENCH_SHAPES[name]
    weights = FAMILIES[model_type].weights(family_config(model_type, **overrides))
    assert sum(prod(shape) for _, shape in weights) / 1e6 == pytest.approx(millions, abs=0.06)
