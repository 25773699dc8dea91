"""Which split of a model over a machine serves the most, within memory and latency, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from jaxserve.deployment import cost, memory, prediction
from jaxserve.deployment.prediction import Decode, Prefill, Traffic
from jaxserve.deployment.shapes import Shape
from jaxserve.errors import ConfigError
from sharding.mesh import Parallelism, layout
from sharding.topology import Topology

MOST_SEQUENCES = 2048
"""Of a device, that are tried."""

PREFILL_TOKENS = (8192, 4096, 2048, 1024, 512)
"""Of a device in one step over prompts, that are tried; the paper has the first, 16,384 per NPU."""

SPREAD_BATCHES = (96, 64, 32, 16, 8, 4)
"""Sequences of a device where experts are spread over all of them; the paper's NPU has 96."""

LARGEST_INSTANCE = 256
"""Devices that read prompts together, that are tried."""


DEEPSEEK = ("deepseek-r1", "deepseek-v3")
PUBLISHED = {"cm384-decode": Parallelism(data=320, expert=320)}
"""An instance that the paper names is a deployment: at a batch that is asked for, as in the paper's
tables, its own split comes first, whatever the search would like better and whether or not it is in
time (`Plan.in_time`). "cm384" is the same hardware with the choice left open."""


@dataclass(frozen=True)
class Wish:
    """What the search may not change.

    Attributes:
        batch: sequences of an accelerator: an NPU of two dies, or a device elsewhere.
        data, expert, tensor: of the split.
        tpot, ttft: seconds that a token, and the first one, may take.
    """

    batch: int | None = None
    data: int | None = None
    expert: int | None = None
    tensor: int | None = None
    tpot: float | None = None
    ttft: float | None = None


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        prefill: an instance of as many devices as read prompts best.
        runner_up: the next best split, if another one works.
        why: the runner-up lost.
    """

    shape: Shape
    topology: Topology
    traffic: Traffic
    wish: Wish
    decode: Decode
    prefill: Prefill
    runner_up: Decode | None
    why: str

    @property
    def batch(self) -> int:
        """Of an accelerator."""
        return batch_of(self.decode, self.topology)

    @property
    def in_time(self) -> bool:
        """Whether a token takes no longer than was asked."""
        return self.wish.tpot is None or self.decode.tpot <= self.wish.tpot


def _published(shape: Shape, topology: Topology, wish: Wish) -> Parallelism | None:
    """The split that goes with the name of a published instance."""
    return PUBLISHED.get(topology.name) if wish.batch and shape.name in DEEPSEEK else None


def batch_of(decode: Decode, topology: Topology) -> int:
    """Sequences of an accelerator."""
    return round(decode.sequences * prediction.devices_per_accelerator(topology))


def plan(shape: Shape, topology: Topology, traffic: Traffic, wish: Wish) -> Plan:
    """The split with the most decoded tokens a second for each device.

    Raises:
        ConfigError: nothing works; with the numbers, and the nearest that does.
    """
    cost.check_chip(topology)
    length, most = traffic.prompt_len + traffic.output_len, shape.cfg.max_len
    if length > most:
        raise ConfigError(
            f"{shape.name} has positions for {most} tokens, and {traffic.prompt_len} in and "
            f"{traffic.output_len} out are {length}; shorten one of them by {length - most}"
        )
    allowed, published = _splits(shape, topology, wish), _published(shape, topology, wish)
    found = [
        best
        for split in allowed
        for wanted in [replace(wish, tpot=None) if split == published else wish]
        if (best := _best_batch(shape, topology, split, traffic, wanted))
    ]
    if not found:
        raise ConfigError(_nothing(shape, topology, allowed, traffic, wish))
    found.sort(key=lambda decode: (decode.split != published, -decode.rate))
    best, second = found[0], found[1] if len(found) > 1 else None
    why = _why(best, second, topology, wish) if second else ""
    prefill = _prefill(shape, topology, traffic, wish)
    return Plan(shape, topology, traffic, wish, best, prefill, second, why)


def widest(shape: Shape, topology: Topology, traffic: Traffic, wish: Wish) -> Plan:
    """The plan that spreads experts over the whole slice, as the paper's supernode does.

    It decodes as many sequences of `SPREAD_BATCHES` as fit, unless the wish says how many.

    Raises:
        ConfigError: as `plan`.
    """
    wish = replace(wish, expert=topology.num_devices, tensor=1)
    for batch in SPREAD_BATCHES if wish.batch is None else ():
        try:
            return plan(shape, topology, traffic, replace(wish, batch=batch))
        except ConfigError:
            continue  # the last word is that of the plan below
    return plan(shape, topology, traffic, wish)


# ---- splits -----------------------------------------------------------------------------------


def refusal(shape: Shape, topology: Topology, split: Parallelism) -> str | None:
    """Why a split does not divide the model, or has no place on the machine; None if it has."""
    cfg, tensor = shape.cfg, split.tensor
    if split.expert > 1 and not cfg.router:
        return f"{shape.name} has no experts to split over expert={split.expert}"
    if not shape.latent and cfg.kv_heads % tensor and tensor % cfg.kv_heads:
        return f"{cfg.kv_heads} key-value heads are not shared evenly by tensor={tensor}"
    sizes = {"attention heads": cfg.heads, "hidden width": cfg.embed, "vocabulary": cfg.vocab}
    if not cfg.router or not all(cfg.moe_layers):
        sizes["MLP width"] = cfg.mlp
    if cfg.router and split.expert == 1:
        sizes["width of an expert"] = cfg.expert_mlp
    for what, size in sizes.items():
        if size % tensor:
            return f"{what} {size} is not divisible by tensor={tensor}"
    try:
        layout(split, topology)
        for group in (split.tensor, split.expert):
            topology.legs(group)
    except ValueError as error:
        return str(error)
    return None


def splits(shape: Shape, topology: Topology, n: int) -> list[Parallelism]:
    """All over n devices that divide the model and have a place on the machine."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    experts = divisors if shape.cfg.router else [1]
    every = (Parallelism(n // t, e, t) for t in divisors for e in experts if e == 1 or e % t == 0)
    return [split for split in every if refusal(shape, topology, split) is None]


def _splits(shape: Shape, topology: Topology, wish: Wish) -> list[Parallelism]:
    """Those over all devices that agree with what is fixed.

    Raises:
        ConfigError: there is none; with the nearest that there is.
    """
    every = splits(shape, topology, topology.num_devices)
    fixed = {k: v for k in ("data", "expert", "tensor") if (v := getattr(wish, k)) is not None}
    kept = [s for s in every if all(getattr(s, k) == v for k, v in fixed.items())]
    if kept:
        return kept
    asked = " ".join(f"{k}={v}" for k, v in fixed.items())
    message = f"{shape.name} on {topology.name} {asked}: {_disagreement(shape, topology, fixed)}"
    if every:
        near = min(
            every, key=lambda s: sum(abs(math.log(getattr(s, k) / v)) for k, v in fixed.items())
        )
        message += f"; the nearest that works is {options(near)}"
    raise ConfigError(message)


def _disagreement(shape: Shape, topology: Topology, fixed: dict[str, int]) -> str:
    n = topology.num_devices
    tensor = fixed.get("tensor") or max(1, n // fixed.get("data", n))
    data = fixed.get("data") or max(1, n // tensor)
    if data * tensor != n:
        return f"data={data} x tensor={tensor} are {data * tensor} devices, and there are {n}"
    try:
        split = Parallelism(data, fixed.get("expert", 1), tensor)
    except ValueError as error:
        return str(error)
    return refusal(shape, topology, split) or "no split agrees with all of that"


def options(split: Parallelism) -> str:
    """As they are typed."""
    return f"--dp {split.data} --ep {split.expert} --tp {split.tensor}"


# ---- batches ----------------------------------------------------------------------------------


def _predictor(
    shape: Shape, topology: Topology, split: Parallelism, traffic: Traffic
) -> Callable[[int], Decode]:
    """By the sequences of a replica of attention."""
    return lambda n: prediction.decode(shape, topology, split, traffic, n / split.tensor)


def _works(decode: Decode, topology: Topology, wish: Wish) -> bool:
    in_time = wish.tpot is None or decode.tpot <= wish.tpot
    return in_time and decode.memory.total <= memory.limit(topology)


def _of_replica(batch: int, split: Parallelism, topology: Topology) -> int | None:
    """Sequences of a replica with so many of an accelerator, if that is a whole number."""
    sequences, rest = divmod(batch * split.tensor, prediction.devices_per_accelerator(topology))
    return None if rest else sequences


def _best_batch(
    shape: Shape, topology: Topology, split: Parallelism, traffic: Traffic, wish: Wish
) -> Decode | None:
    """The largest batch within memory and latency: both, and throughput, grow with it."""
    predict = _predictor(shape, topology, split, traffic)
    if wish.batch is not None:
        sequences = _of_replica(wish.batch, split, topology)
        decode = predict(sequences) if sequences else None
        return decode if decode and _works(decode, topology, wish) else None
    unit = _unit(split, topology)
    low, high = 0, MOST_SEQUENCES * split.tensor // unit
    while low < high:  # so many units of sequences work, and more than `high` do not
        middle = (low + high + 1) // 2
        if _works(predict(middle * unit), topology, wish):
            low = middle
        else:
            high = middle - 1
    return predict(low * unit) if low else None


def _unit(split: Parallelism, topology: Topology) -> int:
    """Sequences of a replica that make a whole number of an accelerator."""
    return split.tensor // math.gcd(split.tensor, prediction.devices_per_accelerator(topology))


# ---- words ------------------------------------------------------------------------------------


def _nothing(
    shape: Shape, topology: Topology, allowed: list[Parallelism], traffic: Traffic, wish: Wish
) -> str:
    """Why no split works, in numbers, and what would."""
    room = memory.limit(topology)
    tried = [d for split in allowed for d in _least(shape, topology, split, traffic, wish)]
    fitting = [d for d in tried if d.memory.total <= room]
    if not tried:
        dies = prediction.devices_per_accelerator(topology)
        why = f"a batch of {wish.batch} is not divided by the {dies} devices that have it"
    elif not fitting:
        least = min(tried, key=lambda d: d.memory.total).memory
        why = (
            f"at least {least.total / 1e9:.1f} GB a device are needed "
            f"({least.cache / 1e9:.1f} of them cache) and {room / 1e9:.1f} may be filled"
        )
    else:
        fast = min(fitting, key=lambda d: d.tpot)
        why = (
            f"no split makes a token within {(wish.tpot or 0) * 1e3:.1f} ms; the nearest takes "
            f"{fast.tpot * 1e3:.1f} ms with {options(fast.split)} "
            f"--batch {batch_of(fast, topology)}, most of it for {fast.binding}"
        )
    advice = _advice(shape, topology, allowed, traffic, wish)
    if not advice and not fitting:
        times = min(d.memory.total for d in tried) / room
        advice = f"the machine is too small: take one about {times:.1f} times as large"
    return f"{shape.name} on {topology.name}: {why}" + (f"; {advice}" if advice else "")


def _advice(
    shape: Shape, topology: Topology, allowed: list[Parallelism], traffic: Traffic, wish: Wish
) -> str:
    """The nearest batch that works, where another one was asked for."""
    if wish.batch is None:
        return ""
    free = replace(wish, batch=None)
    found = [b for s in allowed if (b := _best_batch(shape, topology, s, traffic, free))]
    if not found:
        return ""
    best = max(found, key=lambda d: min(batch_of(d, topology), wish.batch or 0))
    dies = prediction.devices_per_accelerator(topology)
    batch = min(batch_of(best, topology), max(dies, wish.batch - wish.batch % dies))
    return f"the nearest that works is --batch {batch} {options(best.split)}"


def _least(
    shape: Shape, topology: Topology, split: Parallelism, traffic: Traffic, wish: Wish
) -> Iterator[Decode]:
    """A split with the batch that is asked for, or else the smallest."""
    batch, smallest = wish.batch, _unit(split, topology)
    sequences = smallest if batch is None else _of_replica(batch, split, topology)
    if sequences:
        yield _predictor(shape, topology, split, traffic)(sequences)


def _why(best: Decode, second: Decode, topology: Topology, wish: Wish) -> str:
    """What the runner-up spends more on, for each sequence of a step."""
    fewer = 1 - second.rate / best.rate
    text = f"{options(second.split)} decodes {second.rate:,.0f} tokens/s a device, "
    if fewer < 0:
        return f"{text}{-fewer:.1%} more by this model, but is not the split that was published"
    text += f"{fewer:.1%} fewer"
    if batch_of(second, topology) != batch_of(best, topology):
        limited = "memory" if wish.tpot is None else _limit(second, topology, wish)
        text += f", with a batch of {batch_of(second, topology)} limited by {limited}"

    def spent(decode: Decode, resource: str) -> float:
        kind = resource.split()[0]  # one may wait for memory where the other does for arithmetic
        seconds = sum(s for other, s in decode.waits.items() if other.split()[0] == kind)
        return seconds / decode.sequences * 1e6

    most = max(second.waits, key=lambda k: spent(second, k) - spent(best, k))
    return (
        f"{text}: {most} takes {spent(second, most):,.0f} µs of a step for each sequence, "
        f"and {spent(best, most):,.0f} in the best"
    )


def _limit(decode: Decode, topology: Topology, wish: Wish) -> str:
    """Whether memory or latency has kept a batch from growing: which is fuller."""
    filled = decode.memory.total / memory.limit(topology)
    return "memory" if filled > decode.tpot / (wish.tpot or math.inf) else "latency"


# ---- prompts ----------------------------------------------------------------------------------


def _prefill(shape: Shape, topology: Topology, traffic: Traffic, wish: Wish) -> Prefill:
    """The instance, of devices that divide the machine, which reads most with each of them.

    Raises:
        ConfigError: none has the memory, or is as fast as was asked.
    """
    n, room = topology.num_devices, memory.limit(topology)

    def works(p: Prefill) -> bool:
        return p.memory.total <= room and (wish.ttft is None or p.ttft <= wish.ttft)

    tried: list[Prefill] = []
    for size in [d for d in range(1, min(n, LARGEST_INSTANCE) + 1) if n % d == 0]:
        for split in splits(shape, topology, size):
            for sequence in {1, split.tensor}:
                tried += _steps(shape, topology, replace(split, sequence=sequence), traffic, works)
    fitting = [p for p in tried if p.memory.total <= room]
    if working := [p for p in fitting if works(p)]:
        return max(working, key=lambda p: p.rate)
    where = f"{shape.name} on {topology.name}"
    if fitting:
        fast = min(fitting, key=lambda p: p.ttft)
        raise ConfigError(
            f"{where}: no instance answers within {(wish.ttft or 0) * 1e3:.0f} ms; "
            f"the nearest takes {fast.ttft * 1e3:.0f} ms with {fast.split}"
        )
    least = min(tried, key=lambda p: p.memory.total).memory
    raise ConfigError(
        f"{where}: reading prompts of {traffic.prompt_len} tokens needs at least "
        f"{least.total / 1e9:.1f} GB a device ({least.cache / 1e9:.1f} of them cache), and "
        f"{room / 1e9:.1f} may be filled; shorten --prompt-len"
    )


def _steps(
    shape: Shape,
    topology: Topology,
    split: Parallelism,
    traffic: Traffic,
    works: Callable[[Prefill], bool],
) -> Iterator[Prefill]:
    """Ever smaller steps, down to the first that works: larger ones read more with each device."""
    for tokens in PREFILL_TOKENS:
        step = prediction.prefill(shape, topology, split, traffic, tokens)
        yield step
        if works(step):
            return
