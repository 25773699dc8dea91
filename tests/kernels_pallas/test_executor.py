"""What the executor of Hopper's PTX finds of kernels that were spoilt, and what it computes."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.int8_matmul import mosaic_gpu
from kernels_pallas.int8_matmul.cases import case
from kernels_pallas.int8_matmul.reference import int8_matmul
from tests.kernels_pallas.executing import executing
from tests.kernels_pallas.hopper import launch, machine, ptx
from tests.kernels_pallas.hopper.arithmetic import operation
from tests.kernels_pallas.hopper.memory import Global
from tests.kernels_pallas.hopper.order import Order
from tests.kernels_pallas.hopper.ptx import Address, Immediate, Register

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("no_compilation_cache")]

TILE = mosaic_gpu.Tile(128, 2, 128, 2)  # two warpgroups, and one that fills two stages


@cache
def operands():
    """One block of threads, four steps, and rows that are stored in two parts."""
    args, _ = case(128, 128, 512, out_dtype=jnp.float32).make(jax.random.key(1))
    return args


@cache
def kernel():
    taken = []
    with executing(lambda kernel: taken.append(kernel) or kernel):
        mosaic_gpu.gpu(*operands(), out_dtype=jnp.float32, tile=TILE)
    return taken[0]


def ran(changed=lambda kernel: kernel, schedule=None):
    """What the kernel comes to, and what was wrong."""
    x, x_scale, w, w_scale = map(np.asarray, operands())
    given = np.zeros(1, np.int32), x, x_scale, w[None], w_scale[None]  # of layer 0
    outputs = [jax.ShapeDtypeStruct((128, 128), jnp.float32)]
    [found], findings = launch.execute(changed(kernel()), given, outputs, schedule=schedule)
    return found, findings


@cache
def expected():
    return np.asarray(int8_matmul(*operands(), out_dtype=jnp.float32))


def edited(opcode, change, which=slice(None)):
    """Changes those of the instructions whose opcode begins so; there are some."""

    def changed(kernel):
        there = list(kernel.program.instructions)
        places = [i for i, x in enumerate(there) if x.opcode.startswith(opcode)][which]
        assert places
        for i in places:
            there[i] = change(there[i])
        return replace(kernel, program=replace(kernel.program, instructions=tuple(there)))

    return changed


def without(opcode, which=slice(None)):
    return edited(opcode, lambda x: replace(x, parts=("prefetch",)), which)


def last(value):
    """A change of an instruction's last operand."""
    return lambda x: replace(x, operands=(*x.operands[:-1], value))


def at_once(x):
    """A wait that is over."""
    return replace(x, parts=("mov", "pred"), operands=(x.operands[0], Immediate(1)))


@pytest.mark.parametrize("schedule", ["late", "newest", "eager", "any"])
def test_it_finds_nothing_wrong_whenever_copies_happen(schedule):
    found, findings = ran(schedule=schedule)
    assert not findings
    np.testing.assert_array_equal(found, expected())


FILLING, TAKING = (
    slice(0, 2),
    slice(3, 4),
)  # waits for a slot that is free, and for one that is full
SPOILT = {  # what is spoilt, and what is found then
    "a fence of stores": (without("fence.proxy.async"), "reads stores without a fence.proxy.async"),
    "a fence of barriers": (without("fence.mbarrier_init"), "without a fence.mbarrier_init"),
    "a fence of registers": (without("wgmma.fence"), "touched since a wgmma.fence"),
    "a wait for stores": (
        without("cp.async.bulk.wait_group"),
        "ends before its copies were waited for",
    ),
    "a wait for what is stored": (
        without("cp.async.bulk.wait_group", slice(0, 2)),
        "a race: st writes what others use",
    ),
    "a wait for products": (
        without("wgmma.wait_group"),
        "registers of a wgmma are touched before",
    ),
    "a wait for one product more": (
        edited("wgmma.wait_group", last(Immediate(2)), slice(0, 1)),
        "shared memory of a wgmma changed before it was waited for",
    ),
    "a slot filled unasked": (
        edited("mbarrier.try_wait", at_once, FILLING),
        "a race: a copy to shared memory writes what others use",
    ),
    "a slot taken unasked": (
        edited("mbarrier.try_wait", at_once, TAKING),
        "a race: wgmma reads what others write",
    ),
    "what nobody has written": (
        edited("mbarrier.try_wait", at_once, TAKING),
        "wgmma reads shared memory that nobody has written",
    ),
    "an expectation": (without("mbarrier.arrive.expect_tx"), "deadlock, warpgroup "),
    "more registers than there are": (
        edited("setmaxnreg.inc", last(Immediate(256))),
        "for 256 registers",
    ),
    "who arrives too often": (
        edited("mbarrier.arrive.release", last(Immediate(3))),
        "arrive at a barrier that waits for",
    ),
    "a barrier": (without("mbarrier.init"), "no mbarrier at"),
    "an election": (without("elect.sync"), "is read, which nothing has written"),
    "lanes that part": (
        edited("bra", lambda x: replace(x, guard=x.guard and Register("%p1"))),
        "lanes of a warpgroup part",
    ),
    "an address": (
        edited(
            "ld.shared",
            lambda x: replace(
                x, operands=(x.operands[0], Address(x.operands[1].base, x.operands[1].offset + 2))
            ),
        ),
        "is not aligned to",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_it_finds_what_was_spoilt(name):
    """Copies that happen late show what is read too early, early ones what is overwritten."""
    changed, text = SPOILT[name]
    found = [findings for how in ("late", "eager") for _, findings in [ran(changed, how)]]
    assert any(text in finding for findings in found for finding in findings)


def test_a_copy_that_nobody_waits_for_may_happen_late():
    """The second part of the rows takes the place of the first one, which is then stored."""
    changed = without("cp.async.bulk.wait_group")
    early, late = (ran(changed, how)[0] for how in ("eager", "late"))
    np.testing.assert_array_equal(early, expected())
    assert (late[:64] != expected()[:64]).any()


def test_another_swizzle_reads_elsewhere():
    """As products do whose lines lie elsewhere than their copies believe."""

    def changed(kernel):
        tensors = (replace(x, descriptor=replace(x.descriptor, swizzle=16))
                   for x in kernel.launch.tensors)  # fmt: skip
        return replace(kernel, launch=replace(kernel.launch, tensors=tuple(tensors)))

    found, _ = ran(changed)
    assert (found != expected()).any()


def test_copies_that_leave_their_arrays_stop_it():
    def changed(kernel):
        tensors = (replace(x, array=2) for x in kernel.launch.tensors)  # a small one
        return replace(kernel, launch=replace(kernel.launch, tensors=tuple(tensors)))

    _, findings = ran(changed)
    assert any("of global memory leaves arrays" in text for text in findings)


def test_what_it_does_not_know_it_refuses():
    with pytest.raises(ptx.UnknownInstructionError, match="mov"):
        ran(edited("mov.b32", lambda x: replace(x, parts=("move", "b32"))))


TWO_WARPGROUPS = """
.entry exchange(.param .u64 exchange_param_0)
{
    mov.b32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    add.s32 %r3, %r2, __dynamic_shmem__0;
    st.shared.b32 [%r3], %r1;
    BARRIER
    xor.b32 %r4, %r2, 512;
    add.s32 %r5, %r4, __dynamic_shmem__0;
    ld.shared.b32 %r6, [%r5];
    ret;
}
"""


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.sync %r1, 128;", ""])
def test_warpgroups_that_do_not_meet_race(barrier):
    """Each reads what the other one writes, in whatever order they were executed."""
    program = ptx.parse(TWO_WARPGROUPS.replace("BARRIER", barrier))
    grid, memory = machine.Grid((1, 1, 1), 256, 1024, ()), Global([np.zeros(4)])
    for seed in range(4):
        findings = machine.run(program, grid, memory, [], seed=seed, schedule=None)
        races = [text for text in findings if text.startswith("a race: ld reads what others")]
        assert bool(races) == (barrier != "bar.sync 0;")


SOME_LANES_STORE = """
.entry stores(.param .u64 stores_param_0)
{
    ld.param.b64 %rd1, [stores_param_0];
    mov.b32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    setp.ge.u32 %p1, %r1, 48;
    @%p1 bra $behind;
    add.s32 %r1, %r1, 1;
    st.global.b32 [%rd3], %r1;
    BETWEEN
$behind:
    bar.sync 0;
    st.global.b32 [%rd3+512], %r1;
    ret;
}
"""


@pytest.mark.parametrize("between", ["", "bar.sync 0;", "@%p1 bra $behind;", "bra $behind;"])
def test_some_lanes_pass_over_what_others_execute(between):
    program, stored = ptx.parse(SOME_LANES_STORE.replace("BETWEEN", between)), np.zeros(256, "u4")
    grid, memory = machine.Grid((1, 1, 1), 128, 1024, (0,)), Global([stored])
    findings = machine.run(program, grid, memory, [], seed=0, schedule=None)
    if between == "bar.sync 0;":
        assert any("lanes of a warpgroup part" in text for text in findings)
        return
    assert not findings
    lanes = np.arange(128)
    first, then = memory.array(0).reshape(2, 128)
    np.testing.assert_array_equal(first, np.where(lanes < 48, lanes + 1, 0))
    np.testing.assert_array_equal(then, np.where(lanes < 48, lanes + 1, lanes))


def test_what_is_ordered():
    """By what actors tell each other, also through a third one; reads need no order."""
    at, order = np.arange(4), Order(8, 3)
    first, second, third = order.warpgroups
    assert order.writes(at, first)
    assert not order.reads(at, second)
    told = first.tell()
    third.learn(told)
    second.learn(third.tell())
    assert order.reads(at, second)
    assert order.reads(at, third)
    assert order.writes(at + 4, second)
    assert not order.writes(at, first)  # others have read it
    copy = order.actor(second.tell())
    assert order.writes(at + 4, copy)
    assert not order.writes(at + 4, second)  # which nobody has waited for
    second.learn(copy.known)
    assert order.reads(at + 4, second)


def bits(*values):
    return np.repeat(np.asarray(values, np.float32)[:, None], 128, 1)


COMPUTED = {
    "copysign.f32": ((-0.0, 3.0), -3.0),
    "rsqrt.approx.f32": ((4.0,), 0.5),
    "cvt.sat.f32.f32": ((1.5,), 1.0),
    "fma.rn.f32": ((1.0, 1 + 2**-23, 2**-25), 1 + 2**-23),
    "fma.rm.f32": ((1.0, 1 + 2**-23, -(2**-60)), 1.0),  # a little less than what is nearest
    "min.NaN.f32": ((np.nan, 1.0), np.nan),
    "max.f32": ((np.nan, 1.0), 1.0),
}


@pytest.mark.parametrize("opcode", COMPUTED)
def test_what_an_instruction_computes(opcode):
    given, value = COMPUTED[opcode]
    names = ", ".join(f"%r{i}" for i in range(len(given) + 1))
    [instruction] = ptx.parse(f".entry f()\n{{\n{opcode} {names};\n}}").instructions
    found = operation(instruction).function(*bits(*given))
    np.testing.assert_array_equal(found, np.full(128, value, np.float32))
