"""What is exported is what was loaded: every tensor, by name, shape and value."""

import os
from pathlib import Path

import numpy as np
import pytest

from jaxserve.checkpoint.export import begin, save_pretrained
from jaxserve.checkpoint.hf import load_params, model_config, read_config
from jaxserve.checkpoint.safetensors import Shards
from jaxserve.errors import CheckpointError
from jaxserve.models.family import FAMILIES, family
from jaxserve.testing import write_checkpoint


def exported(tmp_path, model_type, **settings):
    source = write_checkpoint(tmp_path / "a", model_type, **settings)
    raw, module = read_config(source), family(model_type)
    cfg = model_config(module, raw)
    params = load_params(source, module, cfg, np.float32, progress=False)
    save_pretrained(tmp_path / "b", module, cfg, params, raw, beside=source)
    return source, tmp_path / "b"


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "gpt_oss"])
def test_every_tensor_comes_back(tmp_path, model_type):
    source, copy = exported(tmp_path, model_type)
    before, after = Shards(source), Shards(copy)
    assert set(after.tensors) <= set(before.tensors)
    lost = set(before.tensors) - set(after.tensors)
    assert all("lm_head" in name or ".layers." in name for name in lost), lost  # tied; MTP layers
    for name in after.tensors:
        assert after.tensors[name].shape == before.tensors[name].shape, name
        np.testing.assert_array_equal(after.get(name), before.get(name).astype(np.float32), name)
    assert (copy / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_floats_are_not_said_to_be_quantised(tmp_path):
    """They come of a checkpoint in eight bits that was trained further, for one."""
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    _, copy = exported(tmp_path, "llama", tokenizer=False, quantization_config=fp8)
    assert "quantization_config" not in read_config(copy)


def test_what_was_there_stays_until_the_new_folder_has_come(tmp_path, monkeypatch):
    _, copy = exported(tmp_path, "llama", tokenizer=False)
    (copy / "of the first").touch()
    exported(tmp_path, "llama", tokenizer=False)
    assert not (copy / "of the first").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    (copy / "of the second").touch()
    rename = Path.rename

    def interrupted(path, target):
        if path.name == ".b.writing":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path, "llama", tokenizer=False)
    assert (copy / "of the second").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_its_folder_is_written(tmp_path, there):
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        (disk / "models").mkdir()
    (tmp_path / "b").symlink_to(disk / "models")
    exported(tmp_path, "llama", tokenizer=False)
    assert (tmp_path / "b").is_symlink()
    assert (disk / "models" / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "disk"}


def test_a_mount_point_and_links_in_a_circle_are_refused(tmp_path, monkeypatch):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(CheckpointError, match="cannot be written"):
        begin(loop)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for folder in (tmp_path / "disk", tmp_path / "link"):
        with pytest.raises(CheckpointError, match="disk is a mount point; give a folder in it"):
            begin(folder)
    begin(tmp_path / "disk" / "models")


def test_a_layout_that_can_only_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"experts.* can only be read"):
        exported(tmp_path, "gpt_oss")
    assert not (tmp_path / "b").exists()


def test_a_card_stays_behind(tmp_path):
    source = write_checkpoint(tmp_path / "a", "qwen3")
    for name in ("README.md", "recipe.toml"):
        (source / name).write_text("of the model this one comes from")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    raw, module = read_config(source), family("qwen3")
    cfg = model_config(module, raw)
    params = load_params(source, module, cfg, np.float32, progress=False)
    save_pretrained(tmp_path / "b", module, cfg, params, raw, beside=source)
    found = {path.name for path in (tmp_path / "b").iterdir()}
    assert found == {path.name for path in source.iterdir()} - {"README.md", "recipe.toml"}
