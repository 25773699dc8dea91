"""A step of a model, as operators with their arithmetic and their traffic on one device.

Everything is counted from the family's own sizes. `cost` says how long an operator takes; here
nothing is known of rates. Lengths and rows may be fractions: they are means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from jaxserve.deployment.shapes import Shape
from sharding.mesh import Parallelism

BF16 = 2
SORT_PASSES = 4
"""Of a radix sort of float32 scores, eight bits at a time: sampling adds them up in order."""


@dataclass(frozen=True)
class Collective:
    """What a group of devices does, in the terms of `sharding.collective_time`.

    Attributes:
        kind: "all_to_all", "all_gather", "reduce_scatter" or "all_reduce".
        n: devices of the group, whose ids are neighbours.
    """

    kind: str
    num_bytes: float
    n: int


@dataclass(frozen=True)
class Operator:
    """One kernel on one device.

    Attributes:
        kind: a key of `efficiency.CLASSES`.
        flops: two for each multiply-add.
        weights: bytes of weights that it reads.
        cache: bytes of cached keys and values that it reads.
        passing: bytes of activations that it reads and writes; counted for vector operators alone.
        eight_bit: whether its product is of eight bits, where the chip has them.
    """

    name: str
    kind: str
    flops: float = 0.0
    weights: float = 0.0
    cache: float = 0.0
    passing: float = 0.0
    collective: Collective | None = None
    eight_bit: bool = False


@dataclass(frozen=True)
class Layers:
    """So many equal layers, in the two halves that microbatches interleave."""

    count: int
    attention: tuple[Operator, ...]
    mlp: tuple[Operator, ...]

    @property
    def operators(self) -> tuple[Operator, ...]:
        return self.attention + self.mlp


@dataclass(frozen=True)
class Work:
    """What one replica of attention has to do in a step.

    Attributes:
        sequences: that it serves.
        queries: new tokens of each; drafts to verify are counted.
        keys: cached before them.
        decode: latent attention is absorbed, and scores are drawn for every token.
    """

    sequences: float
    queries: float
    keys: float
    decode: bool

    @property
    def tokens(self) -> float:
        return self.sequences * self.queries

    def seen(self, window: int) -> float:
        """Keys that a new token attends to, in the mean. A step of decoding ends with its keys."""
        if self.decode:
            return min(self.keys, window) if window else self.keys
        p, w = self.queries, min(window or self.queries, self.queries)
        return min(self.keys, window or self.keys) + w - w * w / (2 * p)


@dataclass(frozen=True)
class Model:
    """A shape, split over devices, with weights of so many bytes.

    Attributes:
        eight_bit: matrices of layers are held and multiplied in eight bits.
        imbalance: tokens of the fullest device over the mean, for routed experts.
    """

    shape: Shape
    split: Parallelism
    eight_bit: bool
    imbalance: float = 1.0

    @property
    def width(self) -> int:
        """Bytes of a weight of a layer's matrices."""
        return 1 if self.eight_bit else BF16

    @property
    def placement(self) -> Placement:
        return Placement.of(self.shape, self.split)


@dataclass(frozen=True)
class Placement:
    """Where experts are.

    Attributes:
        routed: devices that hold routed experts.
        slots: routed experts of each of them, with room for a replica where there are several.
        shared: devices that hold nothing but the shared expert; 0 where all hold a copy.
    """

    routed: int
    slots: int
    shared: int = 0

    @classmethod
    def of(cls, shape: Shape, split: Parallelism) -> Placement:
        """The paper's two forms. EP320 = 32 shared + 288 for 256 routed, one on each; and, with
        fewer devices than experts, EP32: 8 of them on each, one redundant, and a shared one.
        """
        experts, n = shape.cfg.router.num_experts, split.expert
        if n == 1:
            return cls(1, experts)
        shared = n // 10 if shared_mlp(shape) and n - n // 10 >= experts else 0
        slots = ceil(experts / (n - shared))
        return cls(n - shared, slots + (slots > 1), shared)


def step(model: Model, work: Work) -> tuple[Layers, ...]:
    """The layers of the model, alike ones together, without those for multi-token prediction."""
    cfg = model.shape.cfg
    sparse = cfg.moe_layers or (False,) * cfg.num_layers
    kinds = list(zip(sparse, cfg.windows, strict=True))
    return tuple(_layers(model, work, kinds.count(kind), *kind) for kind in sorted(set(kinds)))


def draft_layer(model: Model, work: Work) -> Layers:
    """A layer for multi-token prediction, with the product that joins state and embedding."""
    cfg, t = model.shape.cfg, work.tokens
    layer = _layers(model, work, 1, bool(cfg.router), 0)
    join = _product(model, "join", t, 2 * cfg.embed * cfg.embed / model.split.tensor)
    return Layers(1, (join, *layer.attention), layer.mlp)


def head(model: Model, rows: float, *, sample: bool) -> tuple[Operator, ...]:
    """Scores of `rows` tokens; `sample` sorts and draws, otherwise the best is taken."""
    cfg, tensor = model.shape.cfg, model.split.tensor
    params, scores = cfg.vocab * cfg.embed / tensor, rows * cfg.vocab * 4 / tensor
    product = Operator("head", "head", 2 * rows * params, BF16 * params)
    passes = 2 * SORT_PASSES + 1 if sample else 1
    return product, Operator("sampling", "vector", passing=scores * passes)


def _layers(model: Model, work: Work, count: int, is_moe: bool, window: int) -> Layers:
    attend = _latent_attention if model.shape.latent else _grouped_attention
    mlp = _moe(model, work) if is_moe else _dense_mlp(model, work)
    return Layers(count, tuple(attend(model, work, window)), tuple(mlp))


def _product(model: Model, name: str, rows: float, params: float) -> Operator:
    """Rows times a matrix of a layer."""
    return Operator(
        name, "projection", 2 * rows * params, model.width * params, eight_bit=model.eight_bit
    )


def _vectors(name: str, elements: float) -> Operator:
    """Norms, rotations, roundings, sums and layouts between products, by what they pass."""
    return Operator(name, "vector", passing=BF16 * elements)


def _exchange(name: str, kind: str, num_bytes: float, n: int) -> Iterator[Operator]:
    if n > 1:
        yield Operator(name, "exchange", collective=Collective(kind, num_bytes, n))


# ---- attention --------------------------------------------------------------------------------


def _latent_attention(model: Model, work: Work, window: int) -> Iterator[Operator]:
    """MLA: absorbed in decoding; heads split over tensor devices, tokens outside of them (§7)."""
    cfg, split, t = model.shape.cfg, model.split, work.tokens
    heads, down_rows = cfg.heads / split.tensor, t / split.sequence
    row = cfg.kv_lora + cfg.rope_dim
    down = cfg.embed * (cfg.q_lora + row)
    up = heads * (cfg.q_lora or cfg.embed) * cfg.head_dim
    keys_values = heads * cfg.kv_lora * (cfg.nope_dim + cfg.v_dim)
    out = cfg.embed * cfg.v_dim * (cfg.heads if split.sequence > 1 else heads)
    # Keys are absorbed into queries before attention; values, after it, cost the same either way.
    keys_only = heads * cfg.kv_lora * cfg.nope_dim if work.decode else keys_values
    yield _product(model, "prolog", t, up + keys_only + down / split.sequence)
    latents = BF16 * t * (cfg.q_lora + row)
    if split.sequence > 1:
        yield from _exchange("gather latents", "all_gather", latents, split.tensor)
    lanes = row + cfg.kv_lora if work.decode else cfg.head_dim + cfg.v_dim
    yield Operator(
        "attention", "attention", 2 * t * heads * work.seen(window) * lanes,
        cache=BF16 * work.sequences * min(work.keys, window or work.keys) * row,
    )  # fmt: skip
    back = keys_values - keys_only
    yield _product(model, "output", t, back + out / split.sequence)
    if split.sequence > 1:
        values = BF16 * down_rows * cfg.heads * cfg.v_dim
        yield from _exchange("heads to tokens", "all_to_all", values, split.tensor)
    else:
        yield from _exchange("sum of heads", "all_reduce", BF16 * t * cfg.embed, split.tensor)
    outside = 7 * cfg.embed + 4 * (cfg.q_lora + row)
    if work.decode:  # queries: written, rotated, absorbed, read; values: taken back, rounded
        inside = 2 * cfg.head_dim + 2 * cfg.rope_dim + cfg.kv_lora + row + 2 * cfg.kv_lora
        inside += 3 * cfg.v_dim
    else:  # queries, keys and values of every head: written and read, queries rotated between
        inside = 4 * cfg.head_dim + 2 * (cfg.nope_dim + cfg.v_dim) + 3 * cfg.v_dim
    yield _vectors("attention's vectors", down_rows * outside + t * heads * inside)


def _grouped_attention(model: Model, work: Work, window: int) -> Iterator[Operator]:
    """Heads split over tensor devices; fewer key-value heads than devices are held by several."""
    cfg, split, t = model.shape.cfg, model.split, work.tokens
    heads, kv_heads = cfg.heads / split.tensor, max(1, cfg.kv_heads / split.tensor)
    dim = cfg.head_dim
    yield _product(model, "prolog", t, cfg.embed * dim * (heads + 2 * kv_heads))
    yield Operator(
        "attention", "attention", 4 * t * heads * work.seen(window) * dim,
        cache=BF16 * work.sequences * min(work.keys, window or work.keys) * 2 * kv_heads * dim,
    )  # fmt: skip
    yield _product(model, "output", t, cfg.embed * dim * heads)
    yield from _sum(model, "sum of heads", t)
    inside = 4 * heads * dim + 4 * 2 * kv_heads * dim + 2 * heads * dim
    yield _vectors("attention's vectors", t * (7 * cfg.embed / split.sequence + inside))


def _sum(model: Model, name: str, tokens: float) -> Iterator[Operator]:
    """Adds what tensor devices found. With tokens split it is a scatter, and a gather before."""
    num_bytes, n = BF16 * tokens * model.shape.cfg.embed, model.split.tensor
    yield from _exchange(name, "all_reduce", num_bytes, n)


# ---- MLPs -------------------------------------------------------------------------------------


def _dense_mlp(model: Model, work: Work) -> Iterator[Operator]:
    cfg, split, t = model.shape.cfg, model.split, work.tokens
    width = cfg.mlp / split.tensor
    yield _product(model, "mlp", t, 3 * cfg.embed * width)
    yield from _sum(model, "sum of mlp", t)
    yield _vectors("mlp's vectors", t * (6 * cfg.embed / split.sequence + 7 * width))


def _moe(model: Model, work: Work) -> Iterator[Operator]:
    """A token's rows travel to their experts and back, rounded on the way there (§3)."""
    cfg, split, place = model.shape.cfg, model.split, model.placement
    router, shared = cfg.router, shared_mlp(model.shape)
    t = work.tokens / (split.tensor if split.expert > 1 else split.sequence)
    gate = router.num_experts * cfg.embed
    yield Operator("gate", "head", 2 * t * gate, BF16 * gate)
    if split.expert == 1:
        yield from _split_experts(model, work)
        return
    sends = router.top_k + (place.shared > 0)
    spread = t * sends * cfg.embed
    to, back = (Collective("all_to_all", spread * w, split.expert) for w in (model.width, BF16))
    yield Operator("dispatch", "dispatch", collective=to)
    rows = _fullest(model, t)
    one = 3 * cfg.embed * cfg.expert_mlp
    local = 0 if place.shared else t
    weights = min(place.slots, rows) * one + (local > 0) * 3 * cfg.embed * shared
    yield Operator(
        "experts", "experts", 2 * (rows * one + local * 3 * cfg.embed * shared),
        model.width * weights, eight_bit=model.eight_bit,
    )  # fmt: skip
    yield Operator("combine", "combine", collective=back)
    if split.sequence == 1:  # every tensor device goes on with all tokens
        yield from _exchange("gather tokens", "all_gather", BF16 * t * split.tensor * cfg.embed,
                             split.tensor)  # fmt: skip
    a_row = _row_elements(cfg.embed, cfg.expert_mlp)
    local_rows = local * 7 * shared
    own = t * (6 + sends) * cfg.embed
    yield _vectors("experts' vectors", own + rows * a_row + local_rows)


def _row_elements(embed: int, width: float) -> float:
    """Sixteen-bit elements that vector cores pass for a row of an expert.

    It is compacted (eight bits, read and written), read, and its result is written and sent; gate
    and up are written and read, and their product is written, rounded and read.
    """
    return 3.5 * embed + 7 * width


def _fullest(model: Model, tokens: float) -> float:
    """Rows on the device that has most: a layer ends when the last one is done."""
    place, n = model.placement, model.split.expert
    routed = tokens * n * model.shape.cfg.router.top_k / place.routed * model.imbalance
    return max(routed, tokens * n / place.shared) if place.shared else routed


def _split_experts(model: Model, work: Work) -> Iterator[Operator]:
    """Every device has a part of every expert's width."""
    cfg, split, t = model.shape.cfg, model.split, work.tokens
    router, shared = cfg.router, shared_mlp(model.shape) / split.tensor
    one, rows = 3 * cfg.embed * cfg.expert_mlp / split.tensor, t * router.top_k
    touched = router.num_experts * (1 - (1 - router.top_k / router.num_experts) ** t)
    yield Operator(
        "experts", "experts", 2 * (rows * one + t * 3 * cfg.embed * shared),
        model.width * (touched * one + 3 * cfg.embed * shared), eight_bit=model.eight_bit,
    )  # fmt: skip
    yield from _sum(model, "sum of experts", t)
    own = t * (6 / split.sequence + router.top_k) * cfg.embed
    a_row = _row_elements(cfg.embed, cfg.expert_mlp / split.tensor)
    yield _vectors("experts' vectors", own + rows * a_row + t * 7 * shared)


def shared_mlp(shape: Shape) -> int:
    """Width of the MLP that every token visits beside its routed experts."""
    return getattr(shape.cfg, "shared_mlp", 0)


def attention_params(model: Model) -> float:
    """Of one layer on one device; 187.1 M for an unsplit DeepSeek-R1."""
    work = Work(1, 1, 1, decode=True)
    attend: Any = _latent_attention if model.shape.latent else _grouped_attention
    held = sum(o.weights for o in attend(model, work, 0)) / model.width
    if model.split.sequence > 1 and model.shape.latent:
        cfg = model.shape.cfg  # those outside of heads are whole on every device
        whole = cfg.embed * (cfg.q_lora + cfg.kv_lora + cfg.rope_dim + cfg.heads * cfg.v_dim)
        held += whole * (1 - 1 / model.split.sequence)
    return held
