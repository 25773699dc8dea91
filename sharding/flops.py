"""Operations of a compiled program, and how many of them lie under collectives that have begun."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sharding.hlo import Instruction, computations, executions, started


@dataclass(frozen=True)
class Work:
    """Floating-point or integer operations of one run on one device, two for each pair.

    Attributes:
        overlapped: those scheduled between the start of some collective and its end.
    """

    total: float
    overlapped: float

    @property
    def share(self) -> float:
        return self.overlapped / self.total if self.total else 0.0


def by_window(hlo: str, kernel_flops: Mapping[str, float]) -> Work:
    """The products of a scheduled module, and those in a window.

    A loop is followed for each of its runs. Of element-wise work nothing is counted.

    Args:
        kernel_flops: of a call of each kernel that HLO does not see into, by its name.
    """
    bodies, times = computations(hlo), executions(hlo)
    inside = {name: _products(body) for name, body in bodies.items()}
    total = overlapped = 0.0
    fused = {
        name for body in bodies.values() for x in body if x.op == "fusion" for name in _called(x)
    }
    for name, body in bodies.items():
        if not times[name] or name in fused:
            continue
        types, open_ = {x.name: x.type for x in body}, set[str]()
        for x in body:
            if started(x, bodies) is not None:
                open_.add(x.name)
            elif x.op.endswith("-done") and x.operands:
                open_.discard(x.operands[0])
            work = times[name] * _flops(x, types, inside, kernel_flops)
            total += work
            overlapped += work if open_ else 0.0
    return Work(total, overlapped)


def _flops(
    x: Instruction,
    types: Mapping[str, str],
    inside: Mapping[str, float],
    kernel_flops: Mapping[str, float],
) -> float:
    if x.op == "fusion":
        return sum(inside.get(name, 0.0) for name in _called(x))
    if x.op in ("dot", "convolution"):
        return _product(x, types)
    if x.op == "custom-call" and "tpu_custom_call" in x.text:
        return _kernel(x, types, kernel_flops)
    return 0.0


def _called(x: Instruction) -> list[str]:
    return re.findall(r"calls=%?([\w.-]+)", x.text)


def _products(body: list[Instruction]) -> float:
    types = {x.name: x.type for x in body}
    return sum(_product(x, types) for x in body if x.op in ("dot", "convolution"))


def _product(x: Instruction, types: Mapping[str, str]) -> float:
    """Of a product or a convolution, which is what a TPU makes of products."""
    out, (left, right) = math.prod(_shape(x.type)), (_shape(types[n]) for n in x.operands[:2])
    if x.op == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.text)
        return 2.0 * out * math.prod(left[int(i)] for i in (axes[1].split(",") if axes else ()))
    labels = re.search(r"dim_labels=\w+_(\w+)->", x.text)
    assert labels, x.text
    contracted = right[labels[1].index("i")] * _window(x.text)
    return 2.0 * out * contracted


def _window(text: str) -> float:
    """Places of a convolution's window that meet a value: a product of many batches is a window of
    all of them that dilation makes see one."""
    found = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(re.findall(r"(\w+)=([\dx_-]+)", found[1])) if found else {}
    sizes = [int(n) for n in fields.get("size", "1").split("x")]
    dilation = [int(n) for n in fields.get("lhs_dilate", "x".join("1" * len(sizes))).split("x")]
    return math.prod(max(1, n // d) for n, d in zip(sizes, dilation, strict=True))


def _kernel(x: Instruction, types: Mapping[str, str], kernel_flops: Mapping[str, float]) -> float:
    name = re.sub(r"[.\d]+$", "", x.name)
    if name in kernel_flops:
        return kernel_flops[name]
    if name != "int8_matmul":
        return 0.0
    rows, *weights = (_shape(types[n]) for n in x.operands if types[n].startswith("s8["))
    return sum(2.0 * rows[0] * w[-2] * w[-1] for w in weights)


def _shape(type_text: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", type_text)
    return [int(n) for n in found[1].split(",") if n] if found else []
