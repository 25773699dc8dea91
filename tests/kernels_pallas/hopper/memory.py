"""Global and shared memory in bytes, and boxes that TMA copies between the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels_pallas.hopper.order import Actor, Order

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.int64]

GLOBAL = 1 << 32  # the first address of global memory
PARAMETERS = 1 << 44  # of the kernel's parameters, `PARAMETER` bytes apart
PARAMETER = 4096
SHARED = 1024  # of shared memory, whose first KiB the system keeps
_GAP = 4096  # bytes between arrays that belong to none

Findings = Counter[str]
"""What is wrong, and how often it was seen."""


UNWRITTEN = "a load reads shared memory that nobody has written"
"""A finding that need not be one: a kernel may drop what it has read."""


class FaultError(Exception):
    """What a card would stop at: a block of threads cannot go on."""


def lined_up(addresses: Addresses, size: int, what: str) -> None:
    if (addresses % size).any():
        raise FaultError(f"{what} at {addresses.max():#x} is not aligned to {size} bytes")


class Global:
    """Arrays of the kernel, with gaps between them to which nobody may go."""

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Copies them; the first one begins at a multiple of 256 bytes, as all do."""
        raw = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in arrays]
        room = [-(-len(x) // 256) * 256 + _GAP for x in raw]
        self._begins = np.cumsum([_GAP, *room[:-1]], dtype=np.int64) + GLOBAL
        self._ends = self._begins + [len(x) for x in raw]
        self._bytes = np.full(_GAP + sum(room), 0xFF, np.uint8)
        self._like = list(arrays)
        for begin, x in zip(self._begins, raw, strict=True):
            self._bytes[begin - GLOBAL :][: len(x)] = x

    def address(self, array: int) -> int:
        return int(self._begins[array])

    def array(self, number: int) -> NDArray[Any]:
        """What one has become."""
        begin, end, like = self._begins[number], self._ends[number], self._like[number]
        return self._bytes[begin - GLOBAL : end - GLOBAL].view(like.dtype).reshape(like.shape)

    def load(self, at: Addresses, size: int) -> Bytes:  # [n] -> [n, size]
        return self._bytes[self._index(at, size, "a load")]

    def store(self, at: Addresses, values: Bytes) -> None:  # [n], [n, size]
        self._bytes[self._index(at, values.shape[1], "a store")] = values

    def _index(self, at: Addresses, size: int, what: str) -> NDArray[np.int64]:
        array = np.searchsorted(self._begins, at, "right") - 1
        if (array < 0).any() or (at + size > self._ends[array]).any():
            bad = at[(array < 0) | (at + size > self._ends[array])][0]
            raise FaultError(f"{what} of {size} bytes at {bad:#x} of global memory leaves arrays")
        return at[:, None] - GLOBAL + np.arange(size)


class Shared:
    """Shared memory of a block of threads, and who has written each byte.

    Attributes:
        order: in which accesses must have happened.
        unfenced: the warpgroup whose stores of a byte the asynchronous proxy need not see yet
            (8.6, "Proxies"), or -1.
    """

    def __init__(self, size: int, seed: int, findings: Findings, warpgroups: int) -> None:
        end = SHARED + size
        self.order = Order(end, warpgroups)
        self._bytes = np.random.default_rng(seed).integers(0, 256, end, np.uint8)  # nobody's
        self._written = np.zeros(end, bool)
        self.unfenced = np.full(end, -1, np.int8)
        self._findings = findings

    def load(self, at: Addresses, size: int, actor: Actor, who: str) -> Bytes:
        """[n] addresses -> [n, size] through the generic proxy."""
        lined_up(at, size, who)
        index = self._index(at, size, who)
        self._reads(index, actor, who)
        if not self._written[index].all():
            self._findings[UNWRITTEN] += 1
        return self._bytes[index]

    def store(self, at: Addresses, values: Bytes, actor: Actor, who: str) -> None:
        """[n, size] bytes to [n] addresses through the generic proxy."""
        size = values.shape[1]
        lined_up(at, size, who)
        index = self._index(at, size, who)
        self._writes(index, actor, who)
        self._bytes[index], self._written[index] = values, True
        self.unfenced[index] = actor.number

    def fence(self, warpgroup: int) -> None:
        """fence.proxy.async: what this warpgroup has stored is seen by copies and products."""
        self.unfenced[self.unfenced == warpgroup] = -1

    def read_async(self, at: Addresses, size: int, actor: Actor, who: str) -> Bytes:
        """[n] addresses -> [n, size] as copies and products see them."""
        index = self._index(at, size, who)
        self._reads(index, actor, who)
        if not self._written[index].all():
            self._findings[f"{who} reads shared memory that nobody has written"] += 1
        if (self.unfenced[index] >= 0).any():
            self._findings[f"{who} reads stores without a fence.proxy.async between"] += 1
        return self._bytes[index]

    def write_async(self, at: Addresses, values: Bytes, actor: Actor, who: str) -> None:
        index = self._index(at, values.shape[1], who)
        self._writes(index, actor, who)
        self._bytes[index], self._written[index], self.unfenced[index] = values, True, -1

    def read_until_now(self, index: Addresses, actor: Actor, who: str) -> None:
        """Bytes whose reading began earlier."""
        self._reads(index, actor, who)

    def _reads(self, index: Addresses, actor: Actor, who: str) -> None:
        if not self.order.reads(index, actor):
            self._findings[f"a race: {who} reads what others write"] += 1

    def _writes(self, index: Addresses, actor: Actor, who: str) -> None:
        if not self.order.writes(index, actor):
            self._findings[f"a race: {who} writes what others use"] += 1

    def _index(self, at: Addresses, size: int, who: str) -> NDArray[np.int64]:
        if len(at) and (at.min() < SHARED or at.max() + size > len(self._bytes)):
            have = f"{SHARED:#x} to {len(self._bytes):#x}"
            raise FaultError(
                f"{who}: {at.min():#x} to {at.max() + size:#x} of shared memory, which is {have}"
            )
        return at[..., None] + np.arange(size)


def swizzled(at: Addresses, span: int) -> Addresses:
    """Where a byte lies whose rows of 16 to 128 bytes were mixed up (5.5.5): its 16 bytes are
    told from their neighbours by the line of 128 bytes too."""
    return at ^ (((at >> 7) & (span // 16 - 1)) << 4)


@dataclass(frozen=True)
class Descriptor:
    """A tensor in global memory, and the boxes of it that TMA copies (5.5).

    Attributes:
        item: bytes of an element.
        sizes: of the tensor in elements, the slowest axis first.
        strides: in elements.
        box: sizes of a box.
        swizzle: 16 (none), 32, 64 or 128 bytes.
    """

    base: int
    item: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def __post_init__(self) -> None:
        row = self.box[-1] * self.item
        steps = [n * self.item for n in self.strides[:-1]]
        if self.base % 16 or any(n % 16 for n in (*steps, row)):
            raise FaultError(f"{self}: base, strides and rows of a box are whole 16 bytes")
        if self.strides[-1] != 1 or max(self.box) > 256:
            raise FaultError(f"{self}: elements of a row are neighbours, and a box has up to 256")
        if self.swizzle != 16 and row > self.swizzle:
            raise FaultError(f"{self}: rows of a box of {row} bytes are wider than the swizzle")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.item

    def boxed(self, first: Sequence[int], shared: int) -> Box:
        """A box.

        Args:
            first: its element of the lowest coordinates, the slowest axis first.
            shared: its address in shared memory.
        """
        if len(first) != len(self.sizes):
            raise FaultError(f"{len(first)} coordinates of a tensor of sizes {self.sizes}")
        lined_up(np.array([shared]), 128, "a box of TMA")
        inside, offset = np.ones(self.box, bool), np.zeros(self.box, np.int64)
        for axis, (begin, size, stride) in enumerate(
            zip(first, self.sizes, self.strides, strict=True)
        ):
            at = begin + np.arange(self.box[axis]).reshape(-1, *[1] * (len(self.box) - axis - 1))
            inside &= (at >= 0) & (at < size)
            offset += at * stride
        at = np.arange(inside.size) * self.item + shared
        at = swizzled(at, self.swizzle)
        return Box(inside.reshape(-1), offset.reshape(-1) * self.item + self.base, at)


@dataclass(frozen=True)
class Box:
    """Elements of a box: whether a tensor has them, and where they lie."""

    inside: NDArray[np.bool_]
    outer: Addresses  # in global memory
    inner: Addresses  # in shared memory

    def load(self, memory: Global, shared: Shared, item: int, actor: Actor) -> None:
        """What the tensor does not have is zero."""
        values = np.zeros((len(self.inside), item), np.uint8)
        values[self.inside] = memory.load(self.outer[self.inside], item)
        shared.write_async(self.inner, values, actor, "a copy to shared memory")

    def store(self, memory: Global, shared: Shared, item: int, actor: Actor) -> None:
        """What the tensor does not have is left."""
        values = shared.read_async(self.inner, item, actor, "a copy from shared memory")
        memory.store(self.outer[self.inside], values[self.inside])
