"""What the host passes to a kernel: its grid, its parameters and the descriptors of its copies.

The function that launches is straight and computes nothing of its arrays but their addresses. Its
last form before LLVM's is read, which MOSAIC_GPU_DUMP_MLIR_PASSES writes down.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.kernels_pallas.hopper.machine import Grid
from tests.kernels_pallas.hopper.memory import Descriptor, Global

_STAGE = "GpuLaunchLoweringPass"


class UnreadableError(Exception):
    """The host's function is not of the form that this module knows."""


@dataclass(frozen=True)
class Tensor:
    """A descriptor of an array that has no address yet."""

    array: int
    descriptor: Descriptor

    def placed(self, memory: Global) -> Descriptor:
        return replace(self.descriptor, base=memory.address(self.array))


@dataclass(frozen=True)
class Launch:
    """A kernel's launch. Arrays are numbered: those that come, then those that it returns."""

    grid: Grid
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Array:
    number: int
    item: int = 0  # bytes of an element, once it is known


@dataclass
class _Numbers:
    """Numbers in memory of the host, by their place."""

    there: dict[int, int] = field(default_factory=dict)

    def listed(self, count: int) -> tuple[int, ...]:
        return tuple(self.there[i] for i in range(count))


@dataclass(frozen=True)
class _Place:
    """An element of numbers, or of the list of arrays (None)."""

    of: _Numbers | None
    index: int


def read(log: str) -> Launch:
    """The launch, of a log of passes.

    Raises:
        UnreadableError: something is not as expected.
    """
    _, found, module = log.rpartition(f"IR Dump Before {_STAGE}")
    if not found:
        raise UnreadableError(f"no dump before {_STAGE}")
    host = _Host()
    try:
        for line in module.split("IR Dump")[0].splitlines():
            host.execute(line)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UnreadableError(f"the host's function: {type(error).__name__} {error}") from error
    if host.grid is None:
        raise UnreadableError("the host launches nothing")
    return Launch(host.grid, tuple(host.tensors))


class _Host:
    def __init__(self) -> None:
        self.values = dict[str, object]()
        self.tensors = list[Tensor]()
        self.grid: Grid | None = None
        self._listed = ""  # the argument that lists arrays

    def execute(self, line: str) -> None:
        for pattern, function in _KNOWN:
            if found := pattern.search(line):
                function(self, *found.groups())
                return

    def _begin(self, listed: str) -> None:
        self._listed = listed

    def _constant(self, name: str, value: str) -> None:
        self.values[name] = int(value)

    def _step(self, name: str, base: str, index: str) -> None:
        if base == self._listed:
            self.values[name] = _Place(None, int(index))
        elif isinstance(numbers := self.values[base], _Numbers):
            self.values[name] = _Place(numbers, int(index))

    def _load(self, name: str, base: str) -> None:
        place = _Place(None, 0) if base == self._listed else self.values[base]
        listed = isinstance(place, _Place) and place.of is None
        self.values[name] = _Array(place.index) if listed else None

    def _allocate(self, name: str) -> None:
        self.values[name] = _Numbers()

    def _store(self, value: str, place: str) -> None:
        at = self.values[place]
        at = _Place(at, 0) if isinstance(at, _Numbers) else at
        at.of.there[at.index] = self.values[value]

    def _put(self, value: str, numbers: str, index: str) -> None:
        self.values[numbers].there[self.values[index]] = self.values[value]

    def _same(self, name: str, of: str) -> None:
        self.values[name] = self.values.get(of)

    def _typed(self, name: str, of: str, kind: str) -> None:
        """A reference, of whose type the bits of an element are wanted."""
        if "offset" in kind:
            raise UnreadableError(f"memref<{kind} begins within an array")
        value = self.values[of]
        if isinstance(value, _Array):
            bits = re.match(r"(?:\d+x)*[a-z]+(\d+)", kind)[1]
            value = replace(value, item=int(bits) // 8)
        self.values[name] = value

    def _describe(self, operands: str) -> None:
        _, array, _, rank, sizes, strides, swizzle, box = (
            self.values[name.strip()] for name in operands.split(",")
        )
        listed = (numbers.listed(rank) for numbers in (sizes, strides, box))
        sizes, strides, box = listed
        descriptor = Descriptor(0, array.item, sizes, strides, box, swizzle)
        self.tensors.append(Tensor(array.number, descriptor))

    def _launch(self, blocks: str, threads: str, shared: str, operands: str) -> None:
        blocks, threads = (
            tuple(self.values[name] for name in re.findall(r"%\w+", names))
            for names in (blocks, threads)
        )
        given = [self.values[name] for name in re.findall(r"(%\w+) :", operands)]
        arrays = tuple(x.number if isinstance(x, _Array) else None for x in given)
        if arrays.count(None) > 1:
            raise UnreadableError(f"{arrays.count(None)} parameters are no arrays")
        self.grid = Grid(blocks, threads[0], self.values[shared], arrays)


_KNOWN: list[tuple[re.Pattern[str], Callable[..., None]]] = [
    (re.compile(pattern), function)
    for pattern, function in (
        # of two arguments the second one lists arrays
        (r"func\.func @\w+_mosaic_gpu\(%\w+: !llvm\.ptr.*?, (%\w+): !llvm\.ptr", _Host._begin),
        (r"(%\w+) = llvm\.mlir\.constant\((-?\d+) :", _Host._constant),
        (r"(%\w+) = llvm\.getelementptr (%\w+)\[(\d+)\] ", _Host._step),
        (r"(%\w+) = llvm\.load (%\w+) :", _Host._load),
        (r"(%\w+) = llvm\.alloca ", _Host._allocate),
        (r"llvm\.store (%\w+), (%\w+) :", _Host._store),
        (r"(%\w+) = memref\.alloca\(\)", _Host._allocate),
        (r"memref\.store (%\w+), (%\w+)\[(%\w+)\]", _Host._put),
        (r"(%\w+) = llvm\.insertvalue (%\w+), %\w+\[1\]", _Host._same),
        (r"(%\w+) = llvm\.insertvalue %\w+, (%\w+)\[", _Host._same),
        (r"(%\w+) = memref\.reinterpret_cast (%\w+) to offset: \[0\]", _Host._same),
        (r"(%\w+) = memref\.transpose (%\w+) ", _Host._same),
        (r"(%\w+) = builtin\.unrealized_conversion_cast (%\w+) : memref<(\S+)", _Host._typed),
        (r"(%\w+) = builtin\.unrealized_conversion_cast (%\w+) :", _Host._same),
        (r"(%\w+) = llvm\.extractvalue (%\w+)\[1\]", _Host._same),
        (r"(%\w+) = llvm\.ptrtoint (%\w+) :", _Host._same),
        (r"(%\w+) = llvm\.add (%\w+), %\w+ :", _Host._same),  # of an offset of 0
        (r"(%\w+) = llvm\.inttoptr (%\w+) :", _Host._same),
        (r"(%\w+) = memref\.extract_aligned\w+ (%\w+) : memref<(\S+)", _Host._typed),
        (r"call @mosaic_gpu_init_tma_desc\(([^)]*)\)", _Host._describe),
        (r"gpu\.launch_func .*?blocks in \((.*?)\) threads in \((.*?)\).*"
         r"dynamic_shared_memory_size (%\w+) args\((.*)\)", _Host._launch),
    )
]  # fmt: skip
