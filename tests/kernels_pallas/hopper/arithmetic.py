"""Instructions that compute registers of other registers, lane by lane (PTX ISA 9.7.1 to 9.7.9).

What a lane holds is a numpy array of 128 of the type that an instruction names; results go back
as bits. Approximations (`ex2.approx` and others, 9.7.3) are computed as exactly as numpy does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.kernels_pallas.hopper.ptx import Instruction

Lanes = NDArray[Any]  # [128]

LANES = 128  # of a warpgroup
WARP = 32
TYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(bool),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "bf16x2": np.dtype(np.uint32),
    "f32": np.dtype(np.float32),
    **{f"b{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"u{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
}
_U32 = np.dtype(np.uint32)
_BFLOAT16 = ml_dtypes.bfloat16


@dataclass(frozen=True)
class Operation:
    """What an instruction computes, and the types that it takes its sources for."""

    sources: tuple[np.dtype[Any], ...]
    function: Callable[..., Lanes]


def operation(instruction: Instruction) -> Operation:
    """What an instruction computes.

    Raises:
        UnknownInstructionError: it is none that is known here.
    """
    make = _TABLE.get(instruction.parts[0])
    found = make(instruction) if make else None
    if found is None:
        raise instruction.unknown()
    return found


def _bits(dtype: np.dtype[Any]) -> int:
    return dtype.itemsize * 8


def _signed(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "i"


def _uniform(count: int, function: Callable[..., Lanes], *allowed: str) -> Any:
    """Of sources of the type that the opcode ends in, with modifiers that change nothing here."""

    def make(instruction: Instruction) -> Operation | None:
        _, *modifiers, kind = instruction.parts
        if kind not in TYPES or not set(modifiers) <= set(allowed):
            return None
        if kind == "bf16x2":
            return Operation((_U32,) * count, _pairs(function))
        return Operation((TYPES[kind],) * count, function)

    return make


def _pairs(function: Callable[..., Lanes]) -> Callable[..., Lanes]:
    return lambda *x: function(*(each.view(_BFLOAT16) for each in x)).view(_U32)


def _multiply(instruction: Instruction) -> Operation | None:
    """mul and mad: low half, high half, whole product, or of floats."""
    name, *how, kind = instruction.parts
    if name == "mul" and not {"lo", "hi", "wide"} & set(how):
        return _uniform(2, np.multiply, "rn", "ftz")(instruction)
    source = TYPES[kind]
    if how == ["wide"]:
        wide = np.dtype(f"{source.kind}{2 * source.itemsize}")
        product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
    elif how in (["lo"], ["hi"]):
        wide, product = source, np.multiply if how == ["lo"] else _high
    else:
        return None
    if name == "mul":
        return Operation((source, source), product)
    return Operation((source, source, wide), lambda a, b, c: product(a, b) + c)


def _high(a: Lanes, b: Lanes) -> Lanes:
    product = a.astype(object) * b.astype(object)
    return (product >> _bits(a.dtype)).astype(a.dtype)


def _extreme(instruction: Instruction) -> Operation | None:
    """min and max: of numbers rather than of NaNs, but for `.NaN`; `.relu` is not below 0."""
    name, *how, kind = instruction.parts
    if not set(how) <= {"NaN", "relu", "ftz"}:
        return None
    pick = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[name]["NaN" in how]
    function = (lambda a, b: np.maximum(pick(a, b), a.dtype.type(0))) if "relu" in how else pick
    return Operation((TYPES[kind],) * 2, function)


def _fma(instruction: Instruction) -> Operation | None:
    if instruction.parts == ("fma", "rm", "f32"):
        return Operation((TYPES["f32"],) * 3, _fma_downwards)
    return _uniform(3, _fma_nearest, "rn", "ftz")(instruction)


def _fma_nearest(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def _fma_downwards(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Exactly: the product is, and what its sum loses tells on which side of the sum it lies."""
    product = a.astype(np.float64) * b
    total = product + c
    rest = total - product
    lost = (product - (total - rest)) + (c - rest)
    near = total.astype(np.float32)
    above = (near > total) | ((near == total) & (lost < 0))
    return np.where(above, np.nextafter(near, np.float32(-np.inf)), near)


def _divide(a: Lanes, b: Lanes) -> Lanes:
    return a / b if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b  # towards zero


def _shift(instruction: Instruction) -> Operation:
    """By as many bits as there are or more, all are gone (9.7.8)."""
    name, kind = instruction.parts
    dtype = TYPES[kind]
    most = _bits(dtype)

    def shift(a: Lanes, count: Lanes) -> Lanes:
        some = np.minimum(count, most - 1).astype(dtype)
        if _signed(dtype):
            return a >> some
        moved = a << some if name == "shl" else a >> some
        return np.where(count < most, moved, dtype.type(0))

    return Operation((dtype, _U32), shift)


def _extract(instruction: Instruction) -> Operation:
    """bfe: bits from a position on, with the sign of the last one."""
    dtype = TYPES[instruction.parts[-1]]

    def extract(a: Lanes, at: Lanes, count: Lanes) -> Lanes:
        most = np.int64(_bits(dtype))
        at = np.minimum(at.astype(np.int64) & 255, most - 1)
        count = np.minimum(count.astype(np.int64) & 255, most - at)
        up = np.minimum(most - at - count, most - 1).astype(dtype)
        down = np.minimum(most - count, most - 1).astype(dtype)
        return np.where(count > 0, (a << up) >> down, dtype.type(0))

    return Operation((dtype, _U32, _U32), extract)


def _permute(a: Lanes, b: Lanes, selectors: Lanes) -> Lanes:
    """prmt: four bytes of eight; a selector's highest bit spreads the sign instead."""
    given = np.stack([a, b], 1).view(np.uint8)  # [lanes, 8]
    chosen = (selectors[:, None] >> np.arange(0, 16, 4, np.uint32)) & np.uint32(15)
    taken = np.take_along_axis(given, (chosen & 7).astype(np.int64), 1)
    spread = np.where(taken & 128, 255, 0).astype(np.uint8)
    return np.ascontiguousarray(np.where(chosen & 8, spread, taken)).view(_U32)[:, 0]


def _lookup(a: Lanes, b: Lanes, c: Lanes, table: Lanes) -> Lanes:
    """lop3: any function of three bits, as a table of eight."""
    found = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def _compare(instruction: Instruction) -> Operation | None:
    """setp, perhaps combined with another predicate."""
    _, how, *rest = [x for x in instruction.parts if x != "ftz"]
    *joined, kind = rest
    if kind not in TYPES or (compare := _COMPARISONS.get(how)) is None or len(joined) > 1:
        return None
    sources = (TYPES[kind],) * 2
    if not joined:
        return Operation(sources, compare)
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[joined[0]]
    return Operation((*sources, TYPES["pred"]), lambda a, b, p: join(compare(a, b), p))


def _unordered(a: Lanes, b: Lanes) -> Lanes:
    return (a != a) | (b != b)


def _or_unordered(compare: Callable[..., Lanes]) -> Callable[..., Lanes]:
    return lambda a, b: compare(a, b) | _unordered(a, b)


_COMPARISONS: dict[str, Callable[..., Lanes]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b), "neu": np.not_equal,
    "equ": _or_unordered(np.equal), "ltu": _or_unordered(np.less),
    "leu": _or_unordered(np.less_equal), "gtu": _or_unordered(np.greater),
    "geu": _or_unordered(np.greater_equal),
    "nan": _unordered, "num": lambda a, b: ~_unordered(a, b),
}  # fmt: skip


def _convert(instruction: Instruction) -> Operation | None:
    """cvt (9.7.9.21), between integers and floats, in the directions that kernels use."""
    _, *how, to, given = instruction.parts
    if to == "bf16x2" and given == "f32":  # the first source is the upper half
        function = lambda a, b: np.stack([b, a], 1).astype(_BFLOAT16).view(_U32)[:, 0]  # noqa: E731
        return Operation((TYPES["f32"],) * 2, function) if how == ["rn"] else None
    if instruction.parts == ("cvt", "sat", "f32", "f32"):  # NaN is 0
        return Operation((TYPES["f32"],), lambda x: np.clip(np.nan_to_num(x, nan=0.0), 0, 1))
    if to not in TYPES or given not in TYPES or not set(how) <= {"rn", "rni", "rzi", "ftz"}:
        return None
    source, target = TYPES[given], TYPES[to]
    nearest = np.rint if "rni" in how else np.trunc
    if source.kind == "f" and target.kind in "iu":
        return Operation((source,), lambda x: _to_integer(nearest(x), target))
    if source == target == np.float32:
        return Operation((source,), nearest) if how in (["rni"], ["rzi"]) else None
    return Operation((source,), lambda x: x.astype(target))


def _to_integer(x: Lanes, target: np.dtype[Any]) -> Lanes:
    """Saturated, and NaN is 0."""
    limits = np.iinfo(target)
    wide = np.nan_to_num(x.astype(np.float64), nan=0.0)
    return np.clip(wide, limits.min, limits.max).astype(np.int64).astype(target)


def _shuffle(instruction: Instruction) -> Operation | None:
    """shfl.sync of whole warps (9.7.9.6): every lane takes what another one has."""
    how = instruction.parts[2]
    if how not in ("idx", "bfly"):
        return None

    def shuffle(x: Lanes, by: Lanes, clamp: Lanes, mask: Lanes) -> Lanes:
        lane = np.arange(LANES)
        other = by % WARP if how == "idx" else lane % WARP ^ by
        return x[lane // WARP * WARP + other]

    return Operation((_U32,) * 4, shuffle)


def _select(instruction: Instruction) -> Operation:
    dtype = TYPES[instruction.parts[-1]]
    return Operation((dtype, dtype, TYPES["pred"]), lambda a, b, p: np.where(p, a, b))


def _move(instruction: Instruction) -> Operation:
    """mov, and cvta: addresses of all spaces are told apart by their values."""
    return Operation((TYPES[instruction.parts[-1]],), np.copy)


_FLOAT = ("approx", "full", "rn", "ftz")

_TABLE: dict[str, Callable[[Instruction], Operation | None]] = {
    "add": _uniform(2, np.add, "rn", "ftz"), "sub": _uniform(2, np.subtract, "rn", "ftz"),
    "mul": _multiply, "mad": _multiply, "fma": _fma,
    "div": _uniform(2, _divide, *_FLOAT), "rem": _uniform(2, np.fmod),
    "min": _extreme, "max": _extreme, "neg": _uniform(1, np.negative, "ftz"),
    "abs": _uniform(1, np.abs, "ftz"), "not": _uniform(1, np.invert),
    "and": _uniform(2, np.bitwise_and), "or": _uniform(2, np.bitwise_or),
    "xor": _uniform(2, np.bitwise_xor), "shl": _shift, "shr": _shift, "bfe": _extract,
    "rcp": _uniform(1, lambda x: np.float32(1) / x, *_FLOAT),
    "rsqrt": _uniform(1, lambda x: np.float32(1) / np.sqrt(x), *_FLOAT),
    "copysign": _uniform(2, lambda sign, x: np.copysign(x, sign)),
    "sqrt": _uniform(1, np.sqrt, *_FLOAT), "lg2": _uniform(1, np.log2, *_FLOAT),
    "ex2": _uniform(1, lambda x: np.exp2(x.astype(np.float64)).astype(np.float32), *_FLOAT),
    "tanh": _uniform(1, np.tanh, *_FLOAT),
    "prmt": lambda x: Operation((_U32,) * 3, _permute) if x.parts == ("prmt", "b32") else None,
    "lop3": lambda x: Operation((_U32,) * 4, _lookup) if x.parts == ("lop3", "b32") else None,
    "selp": _select, "setp": _compare, "cvt": _convert, "shfl": _shuffle,
    "mov": _move, "cvta": _move,
}  # fmt: skip
