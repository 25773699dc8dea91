"""From a checkpoint in floats to one in eight bits, and back into an engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoint import hf
from jaxserve.checkpoint.reward_head import (
    REWARD_HEAD,
    ROTATED,
    load_reward_head,
    save_reward_head,
)
from jaxserve.checkpoint.schemes import scheme
from jaxserve.cli import main
from jaxserve.cli.quantize import _examples, own_text, read
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models import reward_head
from jaxserve.models.family import family
from jaxserve.models.reward_head import new_reward_head
from jaxserve.quant import PLAIN, QuantizeConfig, check_paths, quantize_checkpoint, weights
from jaxserve.quant.checkpoint import quantize
from jaxserve.quant.leaves import Leaves, readers
from jaxserve.quant.record import TOKENS, batches, record
from jaxserve.testing import write_checkpoint
from kernels_pallas.weight import Int8Weight
from tests.jaxserve.quant.test_preserving import DOCUMENTS, WRITABLE, logits, tiny
from tests.sparing import sparing

LOUD = [3, 17]
ALL = QuantizeConfig(rows=128)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def load(folder: Path):
    raw = hf.read_config(folder)
    module = family(raw["model_type"])
    cfg = hf.model_config(module, raw)
    return hf.load_params(
        folder, module, cfg, "float32", in_int8=weights.is_large, rounded=weights.round_to_int8,
        unrolled=True, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("model_type", sparing(WRITABLE, "deepseek_v3"))
def test_round_trip_to_the_bit(model_type, tmp_path):
    source = write_checkpoint(tmp_path / "in", model_type, tokenizer=False)
    out = quantize_checkpoint(source, tmp_path / "out", ALL, documents=DOCUMENTS, progress=False)
    stored, params = load_file(out / "model.safetensors"), load(out)
    name = "model.layers.1.self_attn.o_proj.weight"
    wo = params.stacks[1].attn.wo
    assert isinstance(wo, Int8Weight) and stored[name].dtype == np.int8
    np.testing.assert_array_equal(np.asarray(wo.values).reshape(stored[name].shape), stored[name])
    np.testing.assert_array_equal(np.asarray(wo.scale).reshape(-1, 1), stored[name + "_scale"])


@pytest.mark.parametrize("model_type", ["qwen2", "deepseek_v3"])
def test_the_engine_serves_it_without_being_asked(model_type, tmp_path):
    source = write_checkpoint(tmp_path / "in", model_type, tokenizer=False)
    out = quantize_checkpoint(source, tmp_path / "out", ALL, documents=DOCUMENTS, progress=False)
    with LLM(out, tokenizer=False, num_pages=16, progress=False) as llm:
        assert llm.plan.quantization == "int8"
        held = jax.tree.leaves(llm.params, is_leaf=lambda x: isinstance(x, Int8Weight))
        assert sum(isinstance(x, Int8Weight) for x in held) > 5
        prompt = {"prompt_token_ids": DOCUMENTS[0]}
        (found,) = llm.generate([prompt], GREEDY)
    assert len(found.outputs[0].token_ids) == 8


def test_what_the_folder_says_of_itself(tmp_path):
    source = write_checkpoint(tmp_path / "in", "deepseek_v3", dtype="bfloat16", shards=2)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    out = quantize_checkpoint(source, tmp_path / "out", PLAIN, progress=False)
    config = json.loads((out / "config.json").read_text())
    found = scheme(config)
    assert found is not None and (found.kind, found.rounds_activations) == ("int8", True)
    quantization = config["quantization_config"]
    assert quantization["format"] == "int-quantized"
    tensors = load_file(out / "model.safetensors")
    kinds = {x.dtype.name for n, x in tensors.items() if not n.endswith(("_scale", "bias"))}
    assert kinds == {"int8", "bfloat16"} and config["dtype"] == "bfloat16"
    modules = {n.removesuffix(".weight") for n, x in tensors.items() if x.dtype == np.int8}
    left = {
        n.removesuffix(".weight") for n, x in tensors.items()
        if x.dtype != np.int8 and x.ndim == 2 and not n.endswith("_scale")
    }  # fmt: skip
    assert left - {"model.embed_tokens"} == set(quantization["ignore"]), (
        "every matrix is accounted for"
    )
    assert all(
        tensors[f"{m}.weight_scale"].shape == (len(tensors[f"{m}.weight"]), 1) for m in modules
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    card = (out / "README.md").read_text()
    assert "transformers reads this form of dense models alone" in card
    assert (
        card.startswith("---\nlicense: mit") and "measures:\nmixed precision, per channel." in card
    )


def test_a_hub_models_card_and_licence_go_along_and_code_that_does_not_is_not_named(
    tmp_path, monkeypatch
):
    published = write_checkpoint(tmp_path / "in", "llama", tokenizer=False)
    (published / "README.md").write_bytes(b"---\nlicense: mit\n---\n# Un mod\xe8le\n")  # Latin-1
    (published / "LICENSE").write_text("MIT")
    (published / "modeling_x.py").touch()
    config = json.loads((published / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_x.X"}
    (published / "config.json").write_text(json.dumps(config))

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        (tmp_path / "cache").mkdir(exist_ok=True)
        names = [file.name for file in published.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(published / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    out = quantize_checkpoint("somebody/model", tmp_path / "out", PLAIN, progress=False)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n---\n# Un mod\N{REPLACEMENT CHARACTER}le\n")
    assert (out / "LICENSE").read_text() == "MIT"
    assert not list(out.glob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_plain_is_what_the_engine_does_while_it_loads(tmp_path):
    source = write_checkpoint(tmp_path / "in", "qwen3_moe", tokenizer=False)
    out = quantize_checkpoint(source, tmp_path / "out", PLAIN, progress=False)
    for found, want in zip(
        jax.tree.leaves(load(out)), jax.tree.leaves(load(source)), strict=True
    ):  # fmt: skip
        np.testing.assert_allclose(found, want, rtol=1e-6)


def loud_norms(leaves: Leaves) -> None:
    """Norms let two channels through much louder, and whoever reads them turns them down."""
    for layer, specs in zip(leaves.layers, leaves.specs(), strict=True):
        for norm in ("attn_norm", "mlp_norm"):
            layer[norm][LOUD] *= 60.0
            for name in readers(norm, specs):
                layer[name][..., LOUD] /= 60.0


def loud_stream(leaves: Leaves) -> None:
    """Every token has the same two large values in its embedding: a massive activation."""
    leaves.outer["embed"][:, LOUD] = 60.0


def error_of(
    folder: Path, model_type: str, config: QuantizeConfig, spoil: Callable[[Leaves], None] | None
) -> float:
    """Relative error of the logits, of a model with or without outliers."""
    leaves = tiny(folder, model_type)
    if spoil:
        spoil(leaves)
    want = logits(leaves)
    quantize(leaves, config, DOCUMENTS)
    found = logits(leaves)
    return float(np.square(found - want).mean() / np.square(want).mean())


@pytest.mark.parametrize(("spoil", "turned"), [(loud_norms, 5), (loud_stream, 1.3)])
def test_outlier_channels_are_what_the_measures_are_for(spoil, turned, tmp_path):
    def error(**measures: bool) -> float:
        return error_of(tmp_path, "llama", replace(PLAIN, rows=128, **measures), spoil)

    plain = error()
    assert error(scale_search=True) < plain / 3
    assert error(rotations=True) < plain / turned
    every = {"scale_search": True, "rotations": True, "clipping": True, "compensation": True}
    assert error(**every) < plain / 10


def test_without_outliers_the_measures_do_no_harm(tmp_path):
    errors = [error_of(tmp_path, "llama", config, None) for config in (PLAIN, ALL)]
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("name", ["mixed_precision", "per_channel"])
def test_leaving_precision_out_costs(name, tmp_path):
    errors = []
    for config in (PLAIN, replace(PLAIN, **{name: False})):
        errors.append(error_of(tmp_path, "qwen3_moe", config, None))
    assert errors[1] > errors[0]


@pytest.mark.slow
def test_rows_bound_the_memory(tmp_path):
    leaves = tiny(tmp_path, "qwen3_moe")
    few, many = (record(leaves, DOCUMENTS * n, rows=20, seed=0) for n in (1, 8))
    assert many.nbytes < 1.5 * few.nbytes
    assert many.rows(0, "attn.wo").shape[0] == 20
    assert len(many.rows(0, "mlp.experts.w_down", 1)) <= 64
    assert np.shares_memory(many.rows(0, "attn.wq"), many.rows(0, "attn.wk"))


def test_batches_hold_every_document_once_and_no_more_than_a_pass_may():
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 99, n).tolist() for n in (5, 900, 1, 5000, 900, 900, 0)]
    found = []
    for tokens, segments in batches(documents, 3000):
        assert tokens.size <= TOKENS
        found += [t[s > 0].tolist() for t, s in zip(tokens, segments, strict=True)]
    assert sorted(found) == sorted(d[:TOKENS] for d in documents if d)


# ---- the command --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_reads_what_it_is_given_or_has_the_model_write(tmp_path, capsys, monkeypatch):
    source = write_checkpoint(tmp_path / "in", "qwen3")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "The quick brown fox"}\n\n{"prompt": "2 + 2", "completion": "= 4"}\n')
    assert len(read(source, text)) == 2
    arguments = ["quantize", str(source), str(tmp_path / "a"), "--calibration", str(text)]
    assert main([*arguments, "--no-rotations", "--rows", "8"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a")
    assert "rotations" not in (tmp_path / "a" / "README.md").read_text()
    assert main(["quantize", str(source), str(tmp_path / "b"), "--plain"]) == 0
    (source / "examples.json").write_text('[{"prompt": "The"}, {"prompt": "A fox"}]')
    monkeypatch.setattr("jaxserve.cli.quantize.LENGTH", 24)
    written = own_text(source)
    assert len(written) == 128 and len({tuple(d[:2]) for d in written}) > 2
    assert max(map(len, written)) > 20


@pytest.mark.parametrize(
    "content", ['{"examples": []}', '[{"input": "x"}]', '[{"prompt": 5}]', "[]", "{", "[1]", ""]
)
def test_other_examples_beside_a_model_are_passed_over(content, tmp_path, caplog):
    path = tmp_path / "examples.json"
    path.write_text(content)
    assert _examples(path) == []
    assert [f"{path} holds no examples" in r.getMessage() for r in caplog.records] == [True]
    path.write_text('[{"prompt": "The", "answer": 1}, {"prompt": "A"}]')
    assert _examples(path) == ["The", "A"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has no lines"), ("{", "line 1: '{'; expected"), ("[1]", "line 1: '[1]'; expected"),
     ('{"text": "a"}\n\n{"prompt": "a"}', "line 3: '{\"prompt\": \"a\"}'; expected"),
     ('{"text": 5}', "line 1: '{\"text\": 5}'; expected"), ('{"text": ""}', "has no text in it")],
)  # fmt: skip
def test_calibration_that_cannot_be_read_is_refused(content, message, tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", "llama")
    (tmp_path / "text.jsonl").write_text(content)
    arguments = ["--calibration", str(tmp_path / "text.jsonl")]
    assert main(["quantize", str(source), str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scales_of_a_cache_alone_need_no_inputs_of_products(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxserve.quant.checkpoint.record", None)
    leaves = tiny(tmp_path, "llama")
    quantize(leaves, replace(PLAIN, kv_cache=True), DOCUMENTS)
    assert isinstance(leaves.layers[0]["attn.wo"], Int8Weight)


@pytest.mark.slow
def test_it_says_what_it_does_meanwhile(tmp_path, monkeypatch, caplog):
    """Each thing that takes long has a bar that fills, and lines in the log."""
    source, filled = write_checkpoint(tmp_path / "in", "llama"), {}

    def stopped(bar):
        filled.update({t.description: (t.completed, t.total) for t in bar.tasks})

    monkeypatch.setattr("rich.progress.Progress.stop", stopped)
    monkeypatch.setattr("rich.progress.Progress.start", lambda bar: None)
    monkeypatch.setattr("jaxserve.cli.quantize.LENGTH", 8)
    monkeypatch.setattr("jaxserve.cli.quantize.NUM_DOCUMENTS", 4)
    caplog.set_level("INFO", "jaxserve")
    documents = own_text(source, progress=True)
    config = replace(PLAIN, kv_cache=True)
    quantize_checkpoint(source, tmp_path / "out", config, documents=documents)
    for bar in ("writing text", "calibrating the cache", "rounding"):
        assert filled[bar][0] == filled[bar][1] > 0, bar
    assert "the model writes 4 documents of up to 8 tokens" in caplog.text
    assert "layer 2 of 2 is rounded" in caplog.text
    assert "for the scales of the cache" in caplog.text


def test_plain_takes_what_is_asked_for_beside_it(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", "llama")
    plain = ["quantize", str(source), str(tmp_path / "out"), "--plain"]
    assert main([*plain, "--calibration", str(tmp_path / "no.jsonl")]) == 1
    assert "no measure that is left reads text" in capsys.readouterr().err
    assert main([*plain, "--rotations"]) == 0
    assert "mixed precision, rotations, per channel." in (tmp_path / "out/README.md").read_text()


def test_whoever_may_read_the_folder_may_read_its_weights(tmp_path):
    source = write_checkpoint(tmp_path / "in", "llama", tokenizer=False)
    out = quantize_checkpoint(source, tmp_path / "out", PLAIN, progress=False)
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


def test_a_full_disk(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "in", "llama", tokenizer=False)

    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("jaxserve.checkpoint.export.save_file", full)
    with pytest.raises(CheckpointError, match=r"out was not written: .*No space left"):
        quantize_checkpoint(source, tmp_path / "out", PLAIN, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("step", ["_write_shards", "cache_scales.save"])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, step):
    """Scales of the cache come last to be made, and are as much a part of the folder as weights."""
    source = write_checkpoint(tmp_path / "in", "llama", tokenizer=False)

    def interrupted(folder: Path, *_: object) -> None:
        assert folder != tmp_path / "out"
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(f"jaxserve.checkpoint.export.{step}", interrupted)
    monkeypatch.setattr(
        "jaxserve.quant.checkpoint.calibrate_cache", lambda *_, **__: {"k": np.ones(1)}
    )
    config = replace(PLAIN, kv_cache=True)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            source, tmp_path / "out", config, documents=DOCUMENTS[:1], progress=False
        )
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_what_cannot_be_done_is_said_before_anything_is(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "in", "llama", tokenizer=False)
    with pytest.raises(CheckpointError, match="nowhere is no folder here"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"out cannot be written: .*Not a directory"):
        check_paths(source, tmp_path / "file" / "out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="is the folder that you are in"):
        check_paths(source, ".")
    with pytest.raises(ConfigError, match="seed=-1 must be 0 or more"):
        QuantizeConfig(seed=-1)
    with pytest.raises(ConfigError, match="in is not empty; give a folder that is not there"):
        quantize_checkpoint(source, source)
    with pytest.raises(ConfigError, match=r"config.json is a file"):
        quantize_checkpoint(source, source / "config.json")
    with pytest.raises(ConfigError, match="calibration needs documents"):
        quantize_checkpoint(source, tmp_path / "out", documents=[[]])
    with pytest.raises(ConfigError, match="rows=0 must be at least 1"):
        QuantizeConfig(rows=0)
    out = quantize_checkpoint(source, tmp_path / "out", PLAIN, progress=False)
    with pytest.raises(CheckpointError, match="out is in eight bits already"):
        quantize_checkpoint(out, tmp_path / "again", PLAIN)
    other = write_checkpoint(tmp_path / "oss", "gpt_oss", tokenizer=False)
    with pytest.raises(CheckpointError, match="gpt_oss cannot be quantised: its experts"):
        quantize_checkpoint(other, tmp_path / "again", PLAIN)
    assert not (tmp_path / "again").exists()


def test_documents_beyond_the_vocabulary_are_refused(tmp_path):
    source = write_checkpoint(tmp_path / "in", "llama", tokenizer=False)
    with pytest.raises(ConfigError, match="token 9999999"):
        quantize_checkpoint(source, tmp_path / "out", documents=[[3, 9999999]], progress=False)


def test_float_checkpoints_of_eight_bits_are_read_as_floats(tmp_path):
    """DeepSeek publishes float8 blocks: what the scheme was made for."""
    source = write_checkpoint(tmp_path / "in", "llama", tokenizer=False)
    path = source / "model.safetensors"
    import ml_dtypes

    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        shape = tensors[name].shape
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        tensors[name + "_scale_inv"] = np.ones([-(-n // 128) for n in shape], np.float32)
    save_file(tensors, path)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    out = quantize_checkpoint(source, tmp_path / "out", PLAIN, progress=False)
    assert isinstance(load(out).stacks[0].attn.wq, Int8Weight)


@pytest.mark.parametrize("rotations", [True, False])
def test_a_reward_head_comes_along_and_another_is_refused(rotations, tmp_path):
    """Rotated hidden states are another basis: a head of the model in floats would read noise."""
    source = write_checkpoint(tmp_path / "in", "qwen3")
    embed = hf.model_config(family("qwen3"), hf.read_config(source)).embed
    head = new_reward_head(embed, 16, seed=3)
    save_reward_head(source / REWARD_HEAD, head)
    config = replace(PLAIN, rotations=rotations)
    out = quantize_checkpoint(source, tmp_path / "out", config, progress=False)
    assert hf.read_config(out).get(ROTATED, False) == rotations

    def evidence(folder: Path, head) -> np.ndarray:
        with LLM(folder, dtype="float32", max_model_len=64, progress=False) as llm:
            states = [x.embedding for x in llm.embed(DOCUMENTS[:3])]
        return np.asarray(reward_head.evidence(head, np.asarray(states)))

    carried = load_reward_head(out / REWARD_HEAD, embed, rotated=rotations)
    expected, found = evidence(source, head), evidence(out, carried)
    np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())
    if rotations:
        with pytest.raises(CheckpointError, match="in floats, but this checkpoint's are rotated"):
            LLM(out, reward_head=str(source / REWARD_HEAD), progress=False)
