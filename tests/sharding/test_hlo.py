"""Collectives and what runs beside them, as compilers write them and as they compile."""

# ruff: noqa: E501 (lines of HLO are as long as they are)

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import collectives, compile_only
from sharding.hlo import Collective, collectives_of, overlap

GPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%region_0.0 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

ENTRY %main.1 (p: bf16[1024,1024], q: s8[1024,512]) -> (s8[1024,512], bf16[1024,1024]) {
  %p = bf16[1024,1024]{1,0} parameter(0)
  %q = s8[1024,512]{1,0} parameter(1)
  %all-gather-start = (bf16[1024,1024]{1,0}, bf16[2048,1024]{1,0}) all-gather-start(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %all-gather-done = bf16[2048,1024]{1,0} all-gather-done(%all-gather-start)
  %all-to-all-start = ((s8[1024,512]{1,0}), s8[1024,512]{1,0}) all-to-all-start(%q), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %fusion.1 = bf16[2048,1024]{1,0} fusion(%all-gather-done, %p), kind=kCustom, calls=%none
  %rs = ((bf16[2048,1024]{1,0}), bf16[1024,1024]{1,0}) reduce-scatter-start(%fusion.1), replica_groups={{0,1},{2,3}}, to_apply=%region_0.0
  %rs.done = bf16[1024,1024]{1,0} reduce-scatter-done(%rs)
  %fusion.2 = bf16[1024,1024]{1,0} fusion(%rs.done), kind=kCustom, calls=%none
  %all-to-all-done = s8[1024,512]{1,0} all-to-all-done(%all-to-all-start)
  %all-reduce = bf16[1024,1024]{1,0} all-reduce(%fusion.2), replica_groups={}, to_apply=%region_0.0
  ROOT %tuple = (s8[1024,512]{1,0}, bf16[1024,1024]{1,0}) tuple(%all-to-all-done, %all-reduce)
}
"""
TPU = """HloModule jit_g, is_scheduled=true, num_partitions=4

%async_computation (param.0: s8[4,256,512]) -> s8[4,256,512] {
  %param.0 = s8[4,256,512]{2,1,0:T(8,128)(4,1)} parameter(0)
  ROOT %all_to_all.9 = s8[4,256,512]{2,1,0:T(8,128)(4,1)S(1)} all-to-all(%param.0), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: s8[4,256,512], y: bf16[16,8]) -> bf16[16,8] {
  %x = s8[4,256,512]{2,1,0:T(8,128)(4,1)} parameter(0)
  %y = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(1)
  %o = s32[4]{0} constant({0, 1, 2, 3})
  %call-start = ((s8[4,256,512]{2,1,0}), s8[4,256,512]{2,1,0}, s32[]) call-start(%x), calls=%async_computation
  %fusion.3 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} fusion(%y), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"5409"}
  %copy-start = (bf16[16,8], bf16[16,8], u32[]) copy-start(%fusion.3)
  %fusion.4 = bf16[16,8]{1,0:T(8,128)(2,1)} fusion(%y), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"91"}
  %call-done = s8[4,256,512]{2,1,0} call-done(%call-start)
  %r = bf16[16,8]{1,0:T(8,128)(2,1)} ragged-all-to-all(%fusion.4, %y, %o, %o, %o, /*index=5*/%o), replica_groups={{0,1,2,3}}
  ROOT %s = bf16[16,8]{1,0} collective-permute(%r), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
}
"""


def test_collectives_are_read_whatever_their_form():
    assert collectives_of(GPU) == [
        ("all-gather", "bf16", 2 * 1024 * 1024, 2),
        ("all-to-all", "s8", 1024 * 512, 4),
        ("reduce-scatter", "bf16", 2 * 2048 * 1024, 2),
        ("all-reduce", "bf16", 2 * 1024 * 1024, 8),
    ]
    assert collectives_of(TPU) == [
        ("all-to-all", "s8", 4 * 256 * 512, 4),
        ("ragged-all-to-all", "bf16", 2 * 16 * 8, 4),
        ("collective-permute", "bf16", 2 * 16 * 8, 2),
    ]


def test_work_between_start_and_done():
    assert overlap(GPU) == [
        ("all-gather", 0, 0), ("reduce-scatter", 0, 0), ("all-to-all", 2, 0),
    ]  # fmt: skip
    assert overlap(TPU) == [("all-to-all", 2, 5500)]


def test_a_module_that_is_not_scheduled_has_no_order():
    with pytest.raises(ValueError, match="not scheduled"):
        overlap(GPU.replace("is_scheduled=true, ", ""))


@pytest.mark.parametrize(
    "dtype, num_bytes", [("f32", 12), ("s4", 2), ("pred", 3), ("f8e4m3fn", 3), ("c64", 24)]
)
def test_bytes_of_element_types(dtype: str, num_bytes: int):
    text = f"HloModule m\n\nENTRY %e (p: {dtype}[3]) -> {dtype}[3] {{\n  %p = {dtype}[3]{{0}} parameter(0)\n"
    text += f"  ROOT %r = {dtype}[3]{{0}} all-gather(%p), replica_groups={{{{0}}}}\n}}\n"
    assert collectives_of(text) == [Collective("all-gather", dtype, num_bytes, 1)]


def two_microbatches(mesh: Mesh, options: dict) -> str:
    """HLO of two halves that each travel, work and travel back."""

    def half(x, w):
        x = collectives.all_to_all(x.astype(jnp.int8), "x").astype(jnp.bfloat16)
        return collectives.all_to_all(jnp.tanh(x @ w) @ w, "x")

    def step(a, b, w):
        return half(a, w), half(b, w)

    split = P("x")
    whole = jax.shard_map(
        step, mesh=mesh, in_specs=(split, split, P()), out_specs=split, check_vma=False
    )
    rows = jax.ShapeDtypeStruct((4 * 1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, split))
    weight = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    return jax.jit(whole).lower(rows, rows, weight).compile(compiler_options=options).as_text()


@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize(
    "target, options",
    [
        ("v5e:2x2", {"xla_tpu_enable_async_all_to_all": True}),
        ("h200:1x1x4", {}),
    ],
)
def test_compilers_run_an_all_to_all_beside_the_other_half(target: str, options: dict):
    try:
        mesh = compile_only.mesh(target, (4,), ("x",))
    except compile_only.AbsentCompilerError as absent:
        pytest.skip(str(absent))
    text = two_microbatches(mesh, options)
    found = collectives_of(text)
    sizes = [(c.kind, c.dtype, c.num_bytes, c.group_size) for c in found]
    rows = 1024 * 1024
    assert sorted(sizes) == 2 * [("all-to-all", "bf16", 2 * rows, 4)] + 2 * [
        ("all-to-all", "s8", rows, 4)
    ]
    assert sum(window.work > 0 for window in overlap(text)) >= 2
    if options:
        assert not overlap(two_microbatches(mesh, {}))  # by default they block
