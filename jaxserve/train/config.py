"""What a training run is asked to do: a TOML file, read into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxserve.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """Which weights are trained: a checkpoint's, or new ones for a `config.json`.

    Attributes:
        path: folder with a Hugging Face checkpoint.
        config: what its `config.json` would say, for weights drawn from `TrainConfig.seed`. There
            "null" stands for null, which TOML lacks and some families need.
        dtype: of weights and activations.
    """

    path: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if bool(self.path) == bool(self.config):
            raise ConfigError("[model] needs either path or config, and not both")

    @property
    def hf(self) -> dict[str, Any]:
        """`config`, with its nulls."""
        return {key: None if value == "null" else value for key, value in self.config.items()}


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from: a task by name with its settings, or files of JSON lines.

    Attributes:
        task: a key of `reasoning.tasks.TASKS`.
        settings: fields of the task's class.
        files: lines of {"text": ...} or {"prompt": ..., "completion": ...}; prompts are not learnt.
        seed: of problems and solutions, and of the order of lines.
    """

    task: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if bool(self.task) == bool(self.files):
            raise ConfigError("[data] needs either task or files, and not both")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW: linear warm-up, then a cosine down to `final_ratio` of the rate."""

    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_ratio: float = 0.1
    weight_decay: float = 0.01
    b2: float = 0.99
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.learning_rate <= 0 or self.clip_norm <= 0 or self.warmup_steps < 0:
            raise ConfigError(
                f"[optimizer] learning_rate={self.learning_rate} and clip_norm={self.clip_norm} "
                f"must be above 0, and warmup_steps={self.warmup_steps} not below"
            )


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained: everything ("full"), low-rank additions ("lora") or a prompt of free
    embeddings before every text ("soft_prompt").

    Attributes:
        rank, alpha: of LoRA, which adds alpha / rank * B @ A to a weight.
        targets: names of the weights that LoRA adds to, as the family's tree spells them.
        num_virtual_tokens: length of a soft prompt.
    """

    kind: Literal["full", "lora", "soft_prompt"] = "full"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo")
    num_virtual_tokens: int = 16

    def __post_init__(self):
        if self.rank < 1 or self.num_virtual_tokens < 1:
            raise ConfigError(
                f"[adapter] rank={self.rank} and num_virtual_tokens={self.num_virtual_tokens} must "
                "be 1 or more"
            )


@dataclass(frozen=True)
class SaveConfig:
    """Where a run keeps what it needs to go on, and how often.

    Attributes:
        folder: holds `checkpoints/`, `metrics.jsonl` and, when the run is over, `model/`.
        every: steps between checkpoints; what a crash may lose.
        keep: how many of them stay.
    """

    folder: str
    every: int = 500
    keep: int = 2

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ConfigError(f"[save] every={self.every} and keep={self.keep} must be 1 or more")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
        steps: updates in all; the schedule ends with them.
        rows, length: shape of a batch.
        balance: weight of the loss that keeps experts evenly used.
        ahead: weight of the loss of tokens two ahead (multi-token prediction), if config.json has
            `num_nextn_predict_layers`; 0 leaves that layer out.
        layers: "sliced", or "recomputed" for less memory and a third more time.
        seed: of new weights and adapters.
    """

    model: ModelConfig
    data: DataConfig
    save: SaveConfig
    steps: int
    rows: int = 64
    length: int = 128
    balance: float = 0.01
    ahead: float = 0.3
    layers: Literal["sliced", "recomputed"] = "sliced"
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    adapter: AdapterConfig = AdapterConfig()

    def __post_init__(self):
        if min(self.steps, self.rows) < 1 or self.length < 2:
            raise ConfigError(
                f"steps={self.steps} and rows={self.rows} must be 1 or more, length={self.length} 2"
            )


def read_config(path: Path) -> TrainConfig:
    """The run that a file describes.

    Raises:
        ConfigError: no such file, no TOML, or a key that is unknown, missing or of another type.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    try:
        return _make(TrainConfig, table, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _make(cls: type, table: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(fields)}"
            raise ConfigError(f"unknown key {where + key!r}; {hint}")
    for name, f in fields.items():
        plain = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if plain and name not in table:
            raise ConfigError(f"{where + name!r} is missing")
    return cls(**{key: _value(hints[key], value, where + key) for key, value in table.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _make(kind, value, f"{where}.")  # type: ignore[arg-type]
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where!r} must be one of {', '.join(map(repr, args))}, not {value!r}")
    if origin is tuple and isinstance(value, list):
        return tuple(_value(args[0], item, where) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    plain = origin or kind
    if isinstance(plain, type) and isinstance(value, plain) and type(value) is not bool:
        return value
    name = (
        kind.__name__
        if isinstance(kind, type) and not isinstance(kind, types.GenericAlias)
        else kind
    )
    raise ConfigError(f"{where!r} must be {name}, not {value!r}")
