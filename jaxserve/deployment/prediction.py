"""What a split of a model over a machine would do: first token, later tokens, memory, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxserve.deployment import cost, efficiency, memory, operators
from jaxserve.deployment.cost import LayerTime, Waits
from jaxserve.deployment.memory import Memory
from jaxserve.deployment.operators import Model, Work
from jaxserve.deployment.shapes import Shape
from sharding.mesh import Parallelism
from sharding.topology import Topology


@dataclass(frozen=True)
class Traffic:
    """What is asked of a deployment.

    Attributes:
        draft: with one draft per step, where the model has a layer for it.
        microbatch: two may be interleaved.
        balanced: prompts visit experts evenly (perfect placement); decoding is taken to.
        eight_bit: layers' matrices are INT8, or FP8, where the chip has either.
    """

    prompt_len: int = 4096
    output_len: int = 256
    draft: bool = True
    microbatch: bool = True
    balanced: bool = False
    eight_bit: bool = True

    def drafts(self, shape: Shape) -> bool:
        return self.draft and shape.mtp_layers > 0

    @property
    def mean_keys(self) -> float:
        """In the cache, halfway through the output."""
        return self.prompt_len + self.output_len / 2


@dataclass(frozen=True)
class Decode:
    """A step of decoding on every device.

    Attributes:
        sequences: of one device, in the mean.
        seconds: of the step.
        tokens: that it yields for each sequence.
        layers: of it; what is left is head, sampling, draft layer and launches.
        waits: seconds by resource.
    """

    split: Parallelism
    sequences: float
    seconds: float
    tokens: float
    layers: LayerTime
    waits: Waits
    memory: Memory

    @property
    def tpot(self) -> float:
        """Seconds for each token of a sequence."""
        return self.seconds / self.tokens

    @property
    def rate(self) -> float:
        """Tokens a second of one device."""
        return self.sequences / self.tpot

    @property
    def binding(self) -> str:
        """What most of the step waits for."""
        resource, seconds = max(self.waits.items(), key=lambda item: item[1])
        return f"{resource} ({seconds / sum(self.waits.values()):.0%} of the work)"


@dataclass(frozen=True)
class Prefill:
    """A step over prompts on an instance of `split`.

    Attributes:
        seconds: of the step.
        tokens: of each device.
        handoff: seconds to move a prompt's cache to where it is decoded.
    """

    split: Parallelism
    seconds: float
    tokens: float
    handoff: float
    layers: LayerTime
    memory: Memory

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def ttft(self) -> float:
        return self.seconds + self.handoff


def devices_per_accelerator(topology: Topology) -> int:
    """What the paper counts by: an NPU has two dies. Elsewhere it is the JAX device."""
    return topology.parts.get("die", 1) if topology.platform == "npu" else 1


def eight_bit(topology: Topology, traffic: Traffic) -> bool:
    """Whether matrices are held and multiplied in eight bits."""
    return traffic.eight_bit and cost.eight_bit_peak(topology) is not None


def decode(
    shape: Shape, topology: Topology, split: Parallelism, traffic: Traffic, sequences: float
) -> Decode:
    """Predicts a step.

    Args:
        sequences: of one device; a replica of attention over `tensor` devices has as many times it.
    """
    model = Model(shape, replace(split, sequence=1), eight_bit(topology, traffic))
    drafts = traffic.drafts(shape)
    work = Work(sequences * split.tensor, 1 + drafts, traffic.mean_keys, decode=True)
    layers = _layers(model, work, topology, traffic)
    tail = list(operators.head(model, work.tokens, sample=True))
    if drafts:
        tail += operators.draft_layer(model, work).operators
        tail += operators.head(model, work.sequences, sample=False)
    launches = efficiency.LAUNCH_SECONDS * (1 + drafts)
    waits = cost.added(layers.waits, cost.waits(tail, topology), {"launching graphs": launches})
    seconds = layers.seconds + cost.serial(tail, topology) + launches
    tokens = 1 + drafts * efficiency.DRAFT_ACCEPTANCE
    longest = traffic.prompt_len + traffic.output_len
    held = memory.needed(model, work, longest, draft=drafts)
    return Decode(split, sequences, seconds, tokens, layers, waits, held)


def prefill(
    shape: Shape, topology: Topology, split: Parallelism, traffic: Traffic, tokens: int = 8192
) -> Prefill:
    """Predicts a step over `tokens` of each device, or over one prompt if that is more."""
    imbalance = 1.0 if traffic.balanced else efficiency.DEFAULT_IMBALANCE
    model = Model(shape, split, eight_bit(topology, traffic), imbalance)
    of_replica = max(tokens * split.tensor, traffic.prompt_len)
    work = Work(of_replica / traffic.prompt_len, traffic.prompt_len, 0, decode=False)
    layers = _layers(model, work, topology, traffic)
    tail = operators.head(model, work.sequences, sample=True)
    seconds = layers.seconds + cost.serial(tail, topology) + efficiency.LAUNCH_SECONDS
    moved = traffic.prompt_len * memory.kv_bytes(model)
    handoff = moved / topology.fabrics[-1].rate  # the outermost: the others are left to the steps
    held = memory.needed(model, work, traffic.prompt_len, draft=traffic.drafts(shape))
    return Prefill(split, seconds, of_replica / split.tensor, handoff, layers, held)


def _layers(model: Model, work: Work, topology: Topology, traffic: Traffic) -> LayerTime:
    """Of the step as it is, or of two halves interleaved."""
    found = [cost.whole(operators.step(model, work), topology)]
    if traffic.microbatch and work.sequences >= 2:
        half = operators.step(model, replace(work, sequences=work.sequences / 2))
        partitioned = work.decode and topology.chip.name in efficiency.CORES
        found.append((cost.divided if partitioned else cost.overlapped)(half, topology))
    return min(found, key=lambda time: time.seconds)
