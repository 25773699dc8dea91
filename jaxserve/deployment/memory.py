"""What one device holds: its part of the weights, cache, and what tokens travel through."""

from __future__ import annotations

from dataclasses import dataclass, fields

from jaxserve.deployment.operators import BF16, Model, Work, attention_params, shared_mlp
from sharding.topology import Topology

MEMORY_SHARE = 0.95
"""Of a device's memory that all this may fill; the rest is the runtime's and the compiler's."""

SLOT_BYTES = 512
"""Beside a row of eight bits: its scale, padded (§3)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; 2.55, 12.6, 3.7 and 13.8 GB in the paper's decode instance (§11).

    Attributes:
        experts: routed and shared, whichever are more on one device.
        layers: attention, dense MLPs, routers.
        embeddings: table and head, in bfloat16.
        draft: the layers for multi-token prediction.
        cache: keys and values of the longest that sequences become.
        buffers: where rows arrive from all peers and go back to them, each at its own place.
    """

    experts: float
    layers: float
    embeddings: float
    draft: float
    cache: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def needed(model: Model, work: Work, length: float, *, draft: bool) -> Memory:
    """What a device holds that serves such steps over sequences of up to `length` tokens."""
    cfg, split = model.shape.cfg, model.split
    sparse = sum(cfg.moe_layers)
    attention, per_moe = attention_params(model), _expert_params(model)
    gate = BF16 * cfg.router.num_experts * cfg.embed if cfg.router else 0
    dense = (cfg.num_layers - sparse) * 3 * cfg.embed * cfg.mlp / split.tensor
    a_draft = attention + per_moe + 2 * cfg.embed**2 / split.tensor
    return Memory(
        experts=model.width * sparse * per_moe,
        layers=model.width * (cfg.num_layers * attention + dense) + sparse * gate,
        embeddings=BF16 * cfg.vocab * cfg.embed * (1 + cfg.untied) / split.tensor,
        draft=model.shape.mtp_layers * (model.width * a_draft + gate) if draft else 0.0,
        cache=work.sequences * length * kv_bytes(model),
        buffers=_buffers(model, work),
    )


def limit(topology: Topology) -> float:
    """Bytes that may be filled."""
    known = topology.chip.memory_bytes
    assert known is not None  # `cost.check_chip` has seen to it
    return MEMORY_SHARE * known


def kv_bytes(model: Model) -> float:
    """Of a token on one device: a latent row is on every tensor device, heads are split."""
    split_over = min(model.split.tensor, model.shape.cfg.kv_shape[0])
    return model.shape.kv_bytes_per_token / split_over


def _expert_params(model: Model) -> float:
    """Of one layer on one device."""
    cfg, split = model.shape.cfg, model.split
    if not cfg.router:
        return 0.0
    one, shared = 3 * cfg.embed * cfg.expert_mlp, 3 * cfg.embed * shared_mlp(model.shape)
    if split.expert == 1:
        return (cfg.router.num_experts * one + shared) / split.tensor
    place = model.placement
    return max(place.slots * one, shared) if place.shared else place.slots * one + shared


def _buffers(model: Model, work: Work) -> float:
    """Decoding: rows of every peer's worst case have their place, 645 MB at batch 96 (§3).

    Prompts are too many for that: there rows arrive packed, as many as there are.
    """
    cfg, split = model.shape.cfg, model.split
    if not cfg.router or split.expert == 1:
        return 0.0
    sent = cfg.embed * model.width + (SLOT_BYTES if model.eight_bit else 0)
    row, tokens = sent + BF16 * cfg.embed, work.tokens / split.tensor
    if not work.decode:
        return tokens * cfg.router.top_k * row
    return split.expert * tokens * min(cfg.router.top_k, model.placement.slots) * row
