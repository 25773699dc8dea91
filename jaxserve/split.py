"""How devices share a model's work: what settings ask for, and what the model allows."""

from __future__ import annotations

from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.parallel import whole_sizes
from kernels_pallas.target import CPU, Target
from moe.dispatch import Dispatch
from moe.placement import ExpertLayout
from moe.transport import Transport
from sharding.mesh import EXPERTS, Parallelism
from sharding.rules import PREFILL, fitted, local_sizes


def decode_steps_of(config: EngineConfig, parallelism: Parallelism) -> int:
    if config.decode_steps > 1 and parallelism.num_devices > 1:
        raise ConfigError(
            f"decode_steps={config.decode_steps} needs one device: ranks of a mesh would stop at "
            "different steps. Use decode_steps=1"
        )
    return config.decode_steps


def is_interleaved(config: EngineConfig) -> bool:
    if config.eplb_step_interval is not None and config.expert_parallel_size == 1:
        raise ConfigError(
            f"eplb_step_interval={config.eplb_step_interval} moves experts between devices, and "
            "they live on none of their own; set expert_parallel_size, or leave it out"
        )
    if config.enable_dbo and config.expert_parallel_size == 1:
        raise ConfigError(
            "enable_dbo=True hides what travels to experts of other devices, and there are none; "
            "set expert_parallel_size, or leave it out"
        )
    return config.enable_dbo


def sizes_on_device(cfg: Any, parallelism: Parallelism) -> dict[str, int]:
    """What one device has of every axis of a model.

    Raises:
        ConfigError: the split divides some axis of it unevenly, or spreads what cannot be.
    """
    _check_spread(cfg, parallelism)
    try:
        whole = whole_sizes(cfg.sizes, parallelism)
        return local_sizes(fitted(PREFILL, parallelism), whole, parallelism.abstract_mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_spread(cfg: Any, parallelism: Parallelism) -> None:
    """Refuses to spread tokens of models whose layers would have to gather them again."""
    n = parallelism.sequence
    if n == 1:
        return
    if cfg.kv_shape[2]:
        heads, key, value = cfg.kv_shape
        raise ConfigError(
            f"sequence_parallel_size={n} gathers latents between tokens and heads, and this model "
            f"has none: {heads} KV heads keep {heads * (key + value)} values a token; the nearest "
            "setting that works is sequence_parallel_size=1"
        )
    if cfg.router is not None and parallelism.expert == 1:
        raise ConfigError(
            f"sequence_parallel_size={n} gives each device tokens of its own, and with "
            "expert_parallel_size=1 every expert is split over them; the nearest setting that "
            f"works is expert_parallel_size={n}"
        )


ASYNCHRONOUS = {
    "xla_tpu_enable_async_all_to_all": True,
    "xla_tpu_enable_async_ragged_all_to_all": True,
}
"""Without these, libtpu makes both block, and nothing computes meanwhile."""

_WHOLE_ROUTING = 16
"""Chips of a TPU v5e up to which it has a ragged all-to-all, and any that does not block: in larger
slices libtpu has routes for neither ("limited ICI routing")."""


def dispatch_of(
    config: EngineConfig,
    cfg: Any,
    parallelism: Parallelism,
    target: Target,
    quantization: str | None,
) -> Dispatch | None:
    """How tokens reach experts on other devices; rows are rounded where experts would do so."""
    if parallelism.expert == 1:
        return None
    num_experts = cfg.router.num_experts if cfg.router else 0
    if not num_experts:
        raise ConfigError(
            f"expert_parallel_size={parallelism.expert}, and the model has no experts; set "
            "tensor_parallel_size or data_parallel_size"
        )
    slots = -(-(num_experts + config.num_redundant_experts) // parallelism.expert)
    layout = ExpertLayout(num_experts, parallelism.expert, slots)
    limited = target.device == "v5e" and parallelism.num_devices > _WHOLE_ROUTING
    way = "ragged" if target.platform == "tpu" and not limited else "padded"
    transport = Transport(EXPERTS, way, target.platform)
    return Dispatch(layout, transport, early_int8=quantization == "int8")


def check_split(config: EngineConfig, cfg: Any) -> None:
    """Refuses a split that the model does not have, before devices are looked for.

    Raises:
        ConfigError: the message has the numbers, and the nearest that works.
    """
    parallelism = parallelism_of(config)
    sizes_on_device(cfg, parallelism)
    decode_steps_of(config, parallelism)
    is_interleaved(config)
    dispatch_of(config, cfg, parallelism, CPU, None)


def parallelism_of(config: EngineConfig) -> Parallelism:
    """The asked split; experts that are split bring as many replicas of attention along."""
    try:
        return Parallelism.of(
            config.data_parallel_size,
            config.expert_parallel_size,
            config.tensor_parallel_size,
            config.sequence_parallel_size,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
