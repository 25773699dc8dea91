"""A kernel on arrays: compiled for a card that is not there, and executed in numpy."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from sharding import compile_only
from tests.kernels_pallas.hopper import host, machine, ptx
from tests.kernels_pallas.hopper.block import Schedule
from tests.kernels_pallas.hopper.memory import Findings, Global

_TARGET = "h200:1x1x1"
_DUMPS = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_MLIR_PASSES")


@dataclass(frozen=True)
class Compiled:
    """A kernel, and what XLA says of its arrays.

    Attributes:
        aliases: of each array that it returns, the one that comes and is the same; -1 if none.
    """

    program: ptx.Program
    launch: host.Launch
    aliases: tuple[int, ...]


def executed(
    run: Callable[..., Any],
    *operands: Any,
    changed: Callable[[Compiled], Compiled] = lambda kernel: kernel,
    seed: int = 0,
    schedule: Schedule | None = None,
) -> tuple[Any, Findings]:
    """What a function comes to that calls one kernel and does nothing else, and what was wrong.

    Args:
        operands: trees, whose leaves are the kernel's arrays in its order.
        changed: does something to the kernel before it is executed.
        seed: of the order in which warpgroups and copies go on, and of what nobody has written.
        schedule: when copies happen; if None, the seed draws one for every block of threads.

    Raises:
        host.UnreadableError: what this release of JAX launches is not understood.
        ptx.UnknownInstructionError: the kernel uses what the executor does not know.
    """
    leaves, tree = jax.tree.flatten(operands)
    outputs, result_tree = jax.tree.flatten(jax.eval_shape(run, *operands))
    kernel = changed(compiled(lambda *x: run(*jax.tree.unflatten(tree, x)), leaves))
    given = [np.asarray(x) for x in leaves]
    found, findings = execute(kernel, given, outputs, seed=seed, schedule=schedule)
    return jax.tree.unflatten(result_tree, map(jnp.asarray, found)), findings


def execute(
    kernel: Compiled, given: Sequence[NDArray[Any]], outputs: Sequence[Any], *,
    seed: int = 0, schedule: Schedule | None = None,
) -> tuple[list[NDArray[Any]], Findings]:  # fmt: skip
    """Arrays that a kernel returns: those that come and are returned, or new ones of bits set."""
    fresh = [np.full(x.size * x.dtype.itemsize, 0xFF, np.uint8).view(x.dtype).reshape(x.shape)
             for x in outputs]  # fmt: skip
    memory = Global([*given, *fresh])
    places = [len(given) + i if at < 0 else at for i, at in enumerate(kernel.aliases)]
    descriptors = [tensor.placed(memory) for tensor in kernel.launch.tensors]
    grid = kernel.launch.grid
    findings = machine.run(kernel.program, grid, memory, descriptors, seed=seed, schedule=schedule)
    return [memory.array(at) for at in places], findings


def compiled(run: Callable[..., Any], operands: Sequence[Any]) -> Compiled:
    """A function of arrays that are a kernel's operands, compiled. It need not have devices."""
    sharding = NamedSharding(compile_only.mesh(_TARGET), PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in operands]
    lowered = jax.jit(run).lower(*shapes)
    [call] = re.findall(r"custom_call @mosaic_gpu.*", lowered.as_text())
    hashed = re.search(r"kernel_hash = \"(?:[^\"\\]|\\.)*\"", call)
    key = hashed[0] if hashed else call
    if key not in _COMPILED:
        _COMPILED[key] = _compile(lowered, [tuple(x.shape) for x in operands])
    return _COMPILED[key]


_COMPILED = dict[str, Compiled]()  # as Mosaic GPU does, which writes a kernel down only once


def _compile(lowered: Any, shapes: list[tuple[int, ...]]) -> Compiled:
    with tempfile.TemporaryDirectory() as folder, _dumping(Path(folder)):
        text = lowered.compile().as_text()
        programs = list(Path(folder).glob("*.ptx"))
        if len(programs) != 1:
            raise ValueError(
                f"{len(programs)} kernels were compiled, expected one: was it compiled before?"
            )
        [log] = Path(folder).glob("*passes.log")
        program, launch = ptx.parse(programs[0].read_text()), host.read(log.read_text())
    taken, aliases = _arrays(text)
    if taken != shapes:
        raise ValueError(f"the kernel takes arrays {taken}, not {shapes}")
    return Compiled(program, launch, aliases)


def _arrays(hlo: str) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Shapes that the kernel takes, and aliases of what it returns."""
    [call] = re.findall(r"= (.*?) custom-call\((.*)custom_call_target=\"mosaic_gpu\w*\"(.*)", hlo)
    result, _, about = call
    about = about[: about.find("backend_config")]
    layouts = re.search(r"operand_layout_constraints=\{(.*?\})\}", about)
    listed = re.findall(r"\w+\[([\d,]*)\]", layouts[1] if layouts else "")
    shapes = [tuple(int(n) for n in each.split(",") if n) for each in listed]
    count = len(re.findall(r"\w+\[[\d,]*\]", result))
    aliases = dict(re.findall(r"\{(\d*)\}: \((\d+), \{\}", about))
    if count == 1 and "" in aliases:
        aliases["0"] = aliases[""]
    return shapes, tuple(int(aliases.get(str(i), -1)) for i in range(count))


@contextmanager
def _dumping(folder: Path) -> Iterator[None]:
    """Mosaic GPU reads its environment for each kernel that it compiles."""
    before = dict(os.environ)
    os.environ |= dict.fromkeys(_DUMPS, "1") | {"MOSAIC_GPU_DUMP_TO": str(folder)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
