"""What `quantize_checkpoint` does beyond rounding to the nearest."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from jaxserve.errors import ConfigError


@dataclass(frozen=True)
class QuantizeConfig:
    """The measures of CloudMatrix-Infer's scheme, each of which can be left out.

    Attributes:
        mixed_precision: tables, routers and absorbed matrices stay in floats.
        scale_search: channels of activations and weights share their range: s out of
            argmin |Q(W s) Q(x / s) - W x|, folded into what comes before.
        rotations: the residual stream and the values of each head are turned, which spreads
            outliers over channels; the rotations are folded into weights.
        per_channel: a scale for each output instead of one for the matrix.
        clipping: a row's largest weights are clipped where that leaves the smaller output error.
        compensation: what rounding a column adds is taken out of the columns that follow, and what
            is left on average out of the bias, where there is one.
        kv_cache: scales for a cache in eight bits are calibrated and written beside the weights;
            `kv_cache_dtype="int8"` then uses them.
        rows: inputs of a product that are kept to judge it by; memory grows with it.
        seed: of what is drawn: rows and rotations.
    """

    mixed_precision: bool = True
    scale_search: bool = True
    rotations: bool = True
    per_channel: bool = True
    clipping: bool = True
    compensation: bool = True
    kv_cache: bool = True
    rows: int = 1024
    seed: int = 0

    def __post_init__(self):
        if self.rows < 1:
            raise ConfigError(f"rows={self.rows} must be at least 1; 1024 is the default")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be 0 or more; 0 is the default")

    @property
    def reads_inputs(self) -> bool:
        """Whether inputs of products are looked at."""
        return self.scale_search or self.clipping or self.compensation

    @property
    def needs_documents(self) -> bool:
        """Whether the model has to read text."""
        return self.reads_inputs or self.kv_cache


MEASURES = tuple(
    f.name for f in fields(QuantizeConfig) if f.default is True and f.name != "kv_cache"
)

PLAIN = replace(
    QuantizeConfig(),
    scale_search=False,
    rotations=False,
    clipping=False,
    compensation=False,
    kv_cache=False,
)
"""Rounding to the nearest, as `LLM(..., quantization="int8")` does while it loads."""
