"""Training configs: read strictly, and wrong ones say where."""

import pytest

from jaxserve.errors import ConfigError
from jaxserve.train.config import ModelConfig, read_config

GOOD = """
steps = 10
[model]
path = "somewhere"
[data]
task = "modchain"
settings = { modulus = 23 }
[save]
folder = "runs/a"
[optimizer]
learning_rate = 1
[adapter]
kind = "lora"
targets = ["wq"]
"""


def read(tmp_path, text):
    path = tmp_path / "train.toml"
    path.write_text(text)
    return read_config(path)


def test_a_config_is_read(tmp_path):
    config = read(tmp_path, GOOD)
    assert config.steps == 10
    assert config.data.settings == {"modulus": 23}
    assert config.optimizer.learning_rate == 1.0
    assert config.adapter.targets == ("wq",)
    assert config.save.every == 500


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("steps = 10", "stepps = 10"), r"unknown key 'stepps'; did you mean 'steps'"),
        (("learning_rate = 1", "rate = 1"), r"unknown key 'optimizer\.rate'"),
        (("steps = 10", ""), r"'steps' is missing"),
        (("steps = 10", 'steps = "many"'), r"'steps' must be int, not 'many'"),
        (("steps = 10", "steps = true"), r"'steps' must be int, not True"),
        (("steps = 10", "steps = 0"), r"steps=0 .* must be 1 or more"),
        (('kind = "lora"', 'kind = "loral"'), r"'adapter\.kind' must be one of .*not 'loral'"),
        (('targets = ["wq"]', "targets = [1]"), r"'adapter\.targets' must be str, not 1"),
        (('path = "somewhere"', ""), r"\[model\] needs either path or config"),
        (('task = "modchain"', ""), r"\[data\] needs either task or files"),
        (("[save]", "[save"), r"is not TOML"),
        (("learning_rate = 1", "learning_rate = -1"), r"learning_rate=-1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, says):
    assert change[0] in GOOD
    with pytest.raises(ConfigError, match=rf"train\.toml.*{says}"):
        read(tmp_path, GOOD.replace(*change))


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        read_config(tmp_path / "none.toml")


def test_null_can_be_said():
    assert ModelConfig(config={"q_lora_rank": "null", "vocab_size": 3}).hf == {
        "q_lora_rank": None,
        "vocab_size": 3,
    }
