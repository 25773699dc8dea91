"""What share of a rate on the data sheet each class of operator reaches: every constant there is.

No constant belongs to a row of the paper's tables, to a batch or to a length. "Measured" ones are
micro-benchmarks that the paper publishes (specification, section given). Two are "calibrated": the
paper has no measurement of vector work and of what a kernel costs to start, so these two numbers
are set once, for all of its figures of decoding together (the five rows of §10, the two times per
layer of §6, the gain of microbatches in §5), and those figures are no independent check of them.
All were found on the Ascend 910C; on other chips they are an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """Of one class of operator.

    Attributes:
        compute: of the chip's peak for the product's type.
        memory: of its memory bandwidth; 84.1 % is what MLA has been measured at (§4).
        network: of the rate that a fabric is measured to write at.
        source: where the numbers come from.
    """

    compute: float = 1.0
    memory: float = 0.841
    network: float = 1.0
    source: str = ""


CLASSES = {
    "projection": Efficiency(0.80, source="INT8 GEMM, 77.4-82.7 % measured, §9"),
    "experts": Efficiency(0.80, source="INT8 GEMM, 77.4-82.7 % measured, §9"),
    "attention": Efficiency(0.654, source="MLA 65.4 % of BF16, 1,346 of 1,600 GB/s measured, §4"),
    "head": Efficiency(0.80, source="taken to be as projections; BF16, as the gate"),
    "vector": Efficiency(memory=0.37, source="calibrated"),
    "dispatch": Efficiency(network=0.40, source="54 of 135 GB/s measured at EP128 and EP256, §3"),
    "combine": Efficiency(network=0.82, source="128 x 9 BF16 rows in 149 us measured at EP256, §3"),
    "exchange": Efficiency(source="what the fabric is measured at, §1.1"),
}

KERNEL_SECONDS = 15.5e-6
"""To start, fill and drain one operator of a layer; vector work is fused into those. Calibrated."""

LAUNCH_SECONDS = 0.7e-3
"""Of one graph, 0.6 to 0.8 ms (§6); a step with drafts has two, the host waits for neither."""

DRAFT_ACCEPTANCE = 0.70
"""Assumed by the paper (§6): a step with one draft yields 1.7 tokens."""

DEFAULT_IMBALANCE = 1.45
"""Tokens of the fullest device over the mean while prompts are read with the default placement.

SGLang's two rows on H100 (7,417 with perfect placement, 6,288 without, §10) are 18 % apart,
and routed experts are 40 % of what a layer computes here. CloudMatrix' own pair is not used."""

CORES = {"Ascend 910C die": 24}
"""Matrix cores of chips that let two streams each have some of them (§5); vector cores go along."""
