"""Our reader against the safetensors package, and against damage."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxserve.checkpoint import safetensors
from jaxserve.checkpoint.safetensors import Shards
from jaxserve.errors import CheckpointError

FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture
def folder(tmp_path):
    """One shard: `w` [4, 6] float32 and `b` [3] bfloat16."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 6)).astype(np.float32)
    save_file({"w": w, "b": np.arange(3).astype(ml_dtypes.bfloat16)}, tmp_path / "m.safetensors")
    return tmp_path


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_any_float_is_cast_to_any_other(tmp_path, source, target):
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(source)
    save_file({"x": x}, tmp_path / "m.safetensors")
    out = np.empty((5, 7), target)
    Shards(tmp_path).read("x", out)
    np.testing.assert_array_equal(out, x.astype(target))


@given(chunk=st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_a_tensor_longer_than_a_chunk_is_read_whole(tmp_path_factory, chunk):
    folder = tmp_path_factory.mktemp("chunks")
    x = np.arange(35, dtype=np.float32).reshape(5, 7)
    save_file({"x": x}, folder / "m.safetensors")
    out = np.empty((5, 7), np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "_CHUNK", chunk)
        Shards(folder).read("x", out)
    np.testing.assert_array_equal(out, x)


def test_a_tensor_fills_a_slice_and_may_come_with_its_axes_split(folder):
    shards = Shards(folder)
    out = np.zeros((2, 2, 2, 6), np.float32)
    shards.read("w", out[1])
    assert not out[0].any()
    np.testing.assert_array_equal(out[1].reshape(4, 6), shards.get("w"))
    assert shards.get("b").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("shape", [(6, 4), (4, 5), (24,), (4, 6, 2), (2, 12), (4,)])
def test_another_shape_is_refused_by_name(folder, shape):
    with pytest.raises(CheckpointError, match=r"w in m.safetensors has shape \[4, 6\]"):
        Shards(folder).read("w", np.empty(shape, np.float32))


@pytest.mark.parametrize(("stored", "wanted"), [((1,), (6,)), ((1, 6), (6, 6)), ((), (6,))])
def test_a_tensor_that_is_too_short_is_refused_and_what_follows_not_read(tmp_path, stored, wanted):
    tensors = {"a": np.ones(stored, np.float32), "b": np.ones(64, np.float32)}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"a in m.* has shape \{list(stored)}".replace("]", r"\]")
    ):
        Shards(tmp_path).read("a", np.empty(wanted, np.float32))


def test_a_file_that_has_become_shorter_is_refused(folder):
    shards, path = Shards(folder), folder / "m.safetensors"
    path.write_bytes(path.read_bytes()[:-90])
    with pytest.raises(CheckpointError, match=r"m\.safetensors ends within w"):
        shards.get("w")


def test_a_missing_tensor_is_named(folder):
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        Shards(folder).get("nope")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, dtype, bad):
    x = np.ones((3, 3), np.float32)
    x[2, 1] = bad
    save_file({"fine": np.ones(2, np.float32), "x": x.astype(dtype)}, tmp_path / "m.safetensors")
    shards = Shards(tmp_path)
    shards.get("fine")
    with pytest.raises(CheckpointError, match=r"x in m.safetensors holds NaN or infinity"):
        shards.get("x")


def test_weights_beyond_the_target_type_are_refused_by_name(tmp_path):
    save_file({"x": np.full(3, 1e6, np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"x in m.safetensors exceeds float16"):
        Shards(tmp_path).read("x", np.empty(3, np.float16))


@pytest.mark.parametrize("size", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_refused_before_anything_is_read(folder, size):
    path = folder / "m.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"m.safetensors.*(truncated|damaged)"):
        Shards(folder)


def test_a_damaged_header_is_refused(folder):
    path = folder / "m.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"????"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"m.safetensors has a damaged header"):
        Shards(folder)


def header(folder, entries):
    text = json.dumps(entries).encode()
    (folder / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "x in m.safetensors has type F4"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "x in m.safetensors"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [8, 0]}, "x in m.safetensors"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "x in m.safetensors"),
        ({"dtype": "F32", "shape": [4]}, "x in m.safetensors"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [-4, 12]}, "x in m.safetensors"),
        ({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}, "x in m.safetensors has a dam"),
        ({"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}, "x in m.safetensors has a dam"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "x in m.safetensors has a dam"),
        ("nonsense", "x in m.safetensors"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused_by_name(tmp_path, entry, message):
    header(tmp_path, {"x": entry})
    with pytest.raises(CheckpointError, match=message):
        Shards(tmp_path)


def test_a_header_that_is_no_object_is_refused(tmp_path):
    header(tmp_path, [1, 2])
    with pytest.raises(CheckpointError, match=r"m.safetensors has a damaged header"):
        Shards(tmp_path)


def test_shards_are_found_by_their_index(tmp_path):
    for i in (1, 2):
        save_file({f"w{i}": np.full(2, i, np.float32)}, tmp_path / f"model-{i}.safetensors")
    save_file({"stale": np.zeros(2, np.float32)}, tmp_path / "old.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = {f"w{i}": f"model-{i}.safetensors" for i in (1, 2)}
    index.write_text(json.dumps({"weight_map": names}))
    shards = Shards(tmp_path)
    assert sorted(shards.tensors) == ["w1", "w2"]
    assert shards.get("w2").tolist() == [2, 2]
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards: model-2.safetensors"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"x": 3}}',
        '{"weight_map": {"x": null}}',
    ],
)
def test_a_damaged_index_is_refused_by_name(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        Shards(tmp_path)


def test_a_folder_without_shards_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file"):
        Shards(tmp_path)
