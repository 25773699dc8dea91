"""What dispatch and combine put on the wire, read from compiled programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe import wire
from moe.dispatch import Dispatch, arrived, combine, reply, send
from moe.placement import ExpertLayout
from moe.transport import Transport, capacity
from sharding import compile_only
from tests.sparing import sparing

AXES = ("expert", "tensor")
SPLIT, WHOLE = PartitionSpec(AXES), PartitionSpec()
T, A, D = 16, 2, 7168
LAYOUT = ExpertLayout(6, 8, 2)
BYTES = {"s8": 1, "bf16": 2, "i8": 1}


def lowered(transport, mesh):
    d = Dispatch(LAYOUT, transport)

    def run(x, ids, weights, placement):
        came, receipt = send(d, x[0], ids[0], placement)
        rows = arrived(d, came, receipt)[0].dequantized()  # type: ignore[union-attr]
        return combine(reply(d, rows, receipt), receipt, weights[0])[None]

    def shape(*sizes, dtype, spec=SPLIT):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    tables = jax.tree.map(lambda a: shape(*a.shape, dtype=a.dtype, spec=WHOLE), LAYOUT.initial())
    specs = {"in_specs": (SPLIT, SPLIT, SPLIT, WHOLE), "out_specs": SPLIT}
    step = jax.jit(jax.shard_map(run, mesh=mesh, check_vma=False, **specs))
    return step.lower(
        shape(8, T, D, dtype=jnp.bfloat16), shape(8, T, A, dtype=jnp.int32),
        shape(8, T, A, dtype=jnp.float32), tables,
    )  # fmt: skip


def operands(text, op):
    """Element type and shape of every operand of rows (not of counts), in the order of the text."""
    found = [re.findall(r"(\w+)\[([\d,]+)\]", line.split(f" {op}(")[0]) for line in lines(text, op)]
    rows = [(t, tuple(map(int, s.split(",")))) for parts in found for t, s in parts[:8]]
    return [(kind, shape) for kind, shape in rows if not kind.startswith(("s32", "u32"))]


def lines(text, op):
    return [line for line in text.splitlines() if f" {op}(" in line]


def size(parts, kind):
    return sum(BYTES[k] * int(np.prod(shape)) for k, shape in parts if k == kind)


def formula(transport):
    """Bytes that a device sends in a round: every peer a full part of rows of 7,168 + 512 B."""
    part = capacity(transport, T * A, T * min(A, LAYOUT.slots_per_device), 8)
    return 8 * part * (7168 + 512), 8 * part * 2 * 7168


@pytest.mark.mesh
@pytest.mark.parametrize("factor", sparing([0.5, 1.25, 8.0], 1.25))
def test_a_round_of_padded_parts_is_as_large_as_the_formula(factor):
    transport = Transport(AXES, "padded", capacity_factor=factor)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), AXES)
    program = lowered(transport, mesh)
    there, back = formula(transport)
    assert wire.row_bytes(D) == 7680
    compiled = operands(program.compile().as_text(), "all-to-all")
    assert size(compiled, "s8") == there
    # XLA:CPU widens bfloat16, so answers are counted before it does
    answers = re.findall(r"all_to_all.*-> tensor<(\d+)x(\d+)xbf16>", program.as_text())
    assert [2 * int(n) * int(width) for n, width in answers] == [back]
    assert not re.findall(r"all_to_all.*tensor<[\dx]+xf32>", program.as_text())


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize("target", ["v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_rows_travel_in_eight_bits_on_absent_tpus(target):
    mesh = compile_only.mesh(target, (4, 2), AXES)
    for way, op in (("padded", "all-to-all"), ("ragged", "ragged-all-to-all")):
        transport = Transport(AXES, way, "tpu")
        parts = operands(lowered(transport, mesh).compile().as_text(), op)
        there, back = formula(transport) if way == "padded" else (8 * T * A * 7680, T * A * 14336)
        found = {kind: int(np.prod(shape)) * BYTES[kind] for kind, shape in parts}
        assert found == {"s8": there, "bf16": back}
    pushed = lowered(Transport(AXES, "push", "tpu"), mesh).compile().as_text()
    calls = [line for line in pushed.splitlines() if "tpu_custom_call" in line and "%push" in line]
    assert [re.findall(r"= \((\w+)\[", line)[0] for line in calls] == ["s8", "bf16"]


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
def test_ep320_compiles_for_320_absent_devices():
    """The paper's decode instance: 96 tokens a device, 8 + 1 experts each (§3)."""
    layout = ExpertLayout(256, 320, 1, shared_block=10)
    mesh = compile_only.mesh("v5p:4x4x20", (320, 1), AXES)
    d = Dispatch(layout, Transport(AXES, "push", "tpu"))

    def run(x, ids, placement):
        rows, sizes = arrived(d, *send(d, x[0], ids[0], placement))
        return rows.values[None], sizes  # type: ignore[union-attr]

    def shape(*sizes, dtype, spec=SPLIT):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    tables = jax.tree.map(lambda a: shape(*a.shape, dtype=a.dtype, spec=WHOLE), layout.initial())
    step = jax.jit(
        jax.shard_map(
            run, mesh=mesh, in_specs=(SPLIT, SPLIT, WHOLE), out_specs=SPLIT, check_vma=False
        )
    )
    args = shape(320, 96, D, dtype=jnp.bfloat16), shape(320, 96, 9, dtype=jnp.int32), tables
    compiled = step.lower(*args).compile()
    buffer = 320 * 96 * 7680  # ranks x tokens x row: the paper's 225 MB (MiB)
    assert buffer / 2**20 == 225
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * buffer
