"""Published shapes have the sizes that were published."""

import json

import pytest

from jaxserve.deployment import shapes
from jaxserve.deployment.memory import kv_bytes
from jaxserve.deployment.operators import Model, attention_params
from jaxserve.errors import CheckpointError, ConfigError
from sharding.mesh import Parallelism


@pytest.fixture(scope="module")
def deepseek():
    return shapes.read("deepseek-r1")


def test_deepseek_is_of_671_billion(deepseek):
    assert deepseek.num_params / 1e9 == pytest.approx(671.0, abs=0.05)
    assert deepseek.active_params / 1e9 == pytest.approx(36.5, rel=0.005)
    assert deepseek.mtp_layers == 1


def test_deepseeks_parts(deepseek):
    cfg = deepseek.cfg
    unsplit = Model(deepseek, Parallelism(), eight_bit=True)
    assert attention_params(unsplit) / 1e6 == pytest.approx(187.1, abs=0.05)
    assert 3 * cfg.embed * cfg.expert_mlp / 1e6 == pytest.approx(44.04, abs=0.005)
    assert deepseek.kv_bytes_per_token == kv_bytes(unsplit) == 70_272


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("qwen3-235b-a22b", 235.1, 21.6),
        ("qwen3-30b-a3b", 30.5, 3.04),
        ("qwen3-8b", 8.19, 7.57),
        ("llama-3.1-8b", 8.03, 7.50),
        ("llama-3.1-70b", 70.6, 69.5),
    ],
)
def test_other_shapes_have_their_size(name, billions, active):
    shape = shapes.read(name)
    assert shape.num_params / 1e9 == pytest.approx(billions, rel=0.003)
    assert shape.active_params / 1e9 == pytest.approx(active, rel=0.003)
    assert not shape.latent
    assert shape.mtp_layers == 0


def test_a_folder_is_a_shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shapes.SHAPES["qwen3-8b"]))
    assert shapes.read(str(tmp_path)).cfg == shapes.read("qwen3-8b").cfg


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"'llama-3\.1-9b'.*nearest is 'llama-3\.1-8b'"):
        shapes.read("llama-3.1-9b")


def test_a_folder_of_no_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="bert"):
        shapes.read(str(tmp_path))
