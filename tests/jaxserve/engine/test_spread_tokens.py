"""Prompts whose tokens lie over the devices that share their attention (§7)."""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.batch import StepArrays
from jaxserve.engine.programs import Forward
from jaxserve.engine.runner import Runner
from jaxserve.engine.signature import empty_state, program
from jaxserve.engine.spread import empty_states, spread, stacked
from jaxserve.errors import ConfigError
from jaxserve.models.family import family
from jaxserve.models.parallel import placed, put_on_mesh
from jaxserve.plan import Plan, resolve
from jaxserve.quant.weights import weight_bytes
from jaxserve.split import sizes_on_device
from jaxserve.testing import family_config
from sharding import compile_only
from sharding.hlo import Collective, collectives_of
from sharding.mesh import AXES
from sharding.rules import PREFILL, fitted, shardings
from sharding.tree import abstract, initialise, is_weight, unstack
from tests.jaxserve.engine.engines import checkpoint, serve
from tests.jaxserve.engine.test_compiles import MODELS, Absent

T, ROWS, PAGE, PAGES = 32, 8, 8, 16
LENGTHS = (11, 1, 14)
BROKEN = 310
SPLIT: dict[str, Any] = {
    "tensor_parallel_size": 4, "expert_parallel_size": 4, "sequence_parallel_size": 4,
}  # fmt: skip


class Case(NamedTuple):
    """A tiny model with a plan for it."""

    f: Any
    cfg: Any
    plan: Plan
    params: Any
    mesh: Mesh | None

    def run(self, kind: str, ranks: list[StepArrays]) -> tuple[Forward, Any]:
        """What a program makes of an empty cache."""
        made = program(self.plan, self.f, self.cfg, self.params, kind, T)
        if self.mesh is None:
            state, (arrays,) = empty_state(self.plan, self.cfg), ranks
        else:
            made = spread(made, self.plan, self.mesh)
            state, arrays = empty_states(self.plan, self.cfg, self.mesh), stacked(ranks, self.mesh)
        return jax.jit(made.function)(self.params, *state, arrays)


def case(
    model_type: str = "deepseek_v3",
    *,
    interleaved: bool = False,
    dense: bool = False,
    **settings: Any,
) -> Case:
    """Random weights; the embedding of the token `BROKEN` is no number."""
    hf = {**family_config(model_type), "torch_dtype": "float32"}
    hf["first_k_dense_replace"] = hf["num_hidden_layers"] if dense else 1
    hf["q_lora_rank"] = None if model_type == "deepseek_v2" else 20  # None: queries are made of x
    f = family(model_type)
    cfg = f.config(hf)
    config = EngineConfig(
        max_num_seqs=ROWS, num_pages=PAGES, page_size=PAGE, max_model_len=64,
        max_num_batched_tokens=T, kernels="reference", **settings,
    )  # fmt: skip
    plan = resolve(config, hf, cfg, lambda *_: 0, jax.devices()[0])
    plan = replace(plan, interleaved=interleaved)
    declared = unstack(f.declare_params(cfg)) if plan.unrolled else f.declare_params(cfg)
    params = initialise(declared, cfg.sizes, plan.dtype)
    params = replace(params, embed=params.embed.at[BROKEN].set(jnp.nan))
    if not plan.on_mesh:
        return Case(f, cfg, plan, params, None)
    devices = np.array(jax.devices()[: plan.parallelism.num_devices])
    mesh = Mesh(devices.reshape(plan.parallelism.shape), AXES)
    placement = plan.dispatch.layout.initial() if plan.dispatch else None

    def put(w: Any, x: Any) -> Any:
        return put_on_mesh(w, np.asarray(x), cfg.sizes, plan.parallelism, mesh, placement)

    params = jax.tree.map(put, declared, params, is_leaf=is_weight)
    if plan.dispatch is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        tables = plan.dispatch.layout.initial(cfg.num_layers)
        params = placed(params, tables, partial(jax.device_put, device=everywhere))
    return Case(f, cfg, plan, params, mesh)


def step(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, first: int = 5) -> StepArrays:
    """Prompts read from their first tokens, in pages that lie anywhere."""
    rng = np.random.default_rng(seed)
    total, n = sum(lengths), len(lengths)
    tokens, rows = np.zeros((4, T), np.int32), np.zeros((3, ROWS + 1), np.int32)
    tokens[0, :total] = rng.integers(5, 300, total)
    tokens[0, 0] = first
    tokens[1, :total] = np.concatenate([np.arange(k) for k in lengths])
    rows[0, 1 : n + 1], rows[0, n + 1 :] = np.cumsum(lengths), total
    rows[1, :n], rows[2, :n] = lengths, rows[0, 1 : n + 1] - 1
    tables = np.zeros((ROWS, 64 // PAGE), np.int32)
    tables[:n, :4] = np.random.default_rng(1).permutation(PAGES)[: 4 * n].reshape(n, 4)
    return StepArrays(tokens, rows, tables, np.array((n, 0), np.int32))


@functools.cache
def alone(model_type: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [tokens, D] and pages that one device finds in the absorbed form."""
    forward, kv = case(model_type).run("forward", [step(seed=seed)])
    return np.asarray(forward.hidden)[: sum(LENGTHS)], np.asarray(kv.k)


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("model_type", "split"),
    [
        ("deepseek_v3", SPLIT),
        pytest.param("deepseek_v2", {**SPLIT, "expert_parallel_size": 8}, marks=pytest.mark.slow),
    ],
)
def test_states_and_caches_are_those_of_one_device(model_type, split):
    """In float32 both forms agree to 2e-5 of the largest value."""
    spread_out = case(model_type, **split)
    ranks = range(spread_out.plan.num_ranks)
    forward, kv = spread_out.run("beginning", [step(seed=rank) for rank in ranks])
    hidden = np.asarray(forward.hidden).reshape(len(ranks), T, -1)
    pages = np.split(np.asarray(kv.k), len(ranks), 1)
    for rank in ranks:
        states, kept = alone(model_type, rank)
        near = partial(np.testing.assert_allclose, rtol=0)
        near(hidden[rank, : len(states)], states, atol=2e-5 * np.abs(states).max())
        near(pages[rank], kept, atol=2e-5 * np.abs(kept).max())
    for shard in kv.k.addressable_shards:  # each device of a rank has all of its latents
        np.testing.assert_array_equal(shard.data, pages[(shard.index[1].start or 0) // PAGES])


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"kv_cache_dtype": "int8"}, 2e-5),
        pytest.param({"kv_cache_dtype": "int4"}, 2e-5, marks=pytest.mark.slow),
        # products of the two forms round to 8 bits apart
        pytest.param({"dtype": "bfloat16"}, 2e-2, marks=pytest.mark.slow),
    ],
)
def test_both_forms_see_what_the_cache_keeps(settings, tolerance):
    """Keys are made of rows as they would be read again, so a rounded cache means the same."""
    states, _ = case(dense=True, **settings).run("forward", [step()])
    found, _ = case(dense=True, **SPLIT, **settings).run("beginning", [step()])
    states, found = (np.asarray(x.hidden, np.float32)[: sum(LENGTHS)] for x in (states, found))
    np.testing.assert_allclose(found, states, rtol=0, atol=tolerance * np.abs(states).max())


@pytest.mark.slow
@pytest.mark.mesh
def test_prompts_do_not_see_each_other_and_halves_change_no_bit():
    whole = case(**SPLIT)
    states, pages = whole.run("beginning", [step()])
    hidden = np.asarray(states.hidden)
    broken = np.asarray(whole.run("beginning", [step(first=BROKEN)])[0].hidden)
    assert np.isnan(broken[: LENGTHS[0]]).all()
    np.testing.assert_array_equal(broken[LENGTHS[0] :], hidden[LENGTHS[0] :])
    in_turn, pages_in_turn = case(**SPLIT, interleaved=True).run("beginning", [step()])
    real = slice(sum(LENGTHS))
    np.testing.assert_array_equal(np.asarray(in_turn.hidden)[real], hidden[real])
    np.testing.assert_array_equal(pages_in_turn.k, pages.k)


@pytest.mark.slow
@pytest.mark.mesh
def test_a_layer_gathers_latents_and_exchanges_answers():
    """Beside them a step sums its embeddings, and gathers last states and the scores of prompts."""
    f, cfg, plan, params, mesh = case(**SPLIT, dense=True)
    assert mesh is not None
    made = spread(program(plan, f, cfg, params, "beginning", T), plan, mesh)
    found = collectives_of(jax.jit(made.function).lower(*made.arguments).compile().as_text())
    n = plan.parallelism.tensor
    gathered = T // n * (cfg.q_lora + cfg.kv_lora + cfg.rope_dim) * 4
    exchanged = T * cfg.heads // n * cfg.v_dim * 4
    in_a_layer = [
        Collective("all-gather", "f32", gathered, n),
        Collective("all-to-all", "f32", exchanged, n),
    ]
    around = [
        Collective("all-reduce", "f32", T * cfg.embed * 4, n),
        Collective("all-gather", "f32", T // n * cfg.embed * 4, n),
        Collective("all-gather", "f32", T * cfg.vocab // n * 4, n),
    ]
    assert sorted(found) == sorted(in_a_layer * cfg.num_layers + around)


@pytest.mark.mesh
def test_weights_take_what_was_planned():
    """Whole projections among them, though the heads that they read are split."""
    f, cfg, plan, params, _ = case(**SPLIT)
    leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.float32]
    taken = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    local = sizes_on_device(cfg, plan.parallelism)
    assert taken == weight_bytes(f, cfg, jnp.float32, None, local)


def test_every_step_divides_among_devices_and_halves():
    hf = family_config("deepseek_v3")
    cfg = family("deepseek_v3").config(hf)
    config = EngineConfig(**SPLIT, enable_dbo=True, max_num_batched_tokens=50, max_num_seqs=5)
    plan = resolve(config, hf, cfg, lambda *_: 0, jax.devices()[0])
    assert plan.token_buckets == (8, 16, 32, 56)
    beginning = [size for kind, size in plan.programs if kind == "beginning"]
    assert beginning == [16, 32, 56]
    assert plan.num_programs == len(set(plan.programs))


TOKENS = [[1, 2, 3] * 3 + [5], [7], [11, 12, 13, 14, 15], [21, 22] * 12]


@pytest.mark.mesh
@pytest.mark.slow
def test_what_is_read_by_tokens_decodes_on(monkeypatch):
    """With two halves and two ranks; a prompt longer than a step goes on in another form."""
    kinds, choose = [], Runner._forward

    def watched(runner: Runner, steps: Any) -> tuple[str, int]:
        kinds.append(choose(runner, steps))
        return kinds[-1]

    def said(llm: LLM) -> list[Any]:
        prompts = [{"prompt_token_ids": ids} for ids in TOKENS]
        params = SamplingParams(temperature=0, max_tokens=8)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    with serve(checkpoint("deepseek_v3")) as llm:
        expected = said(llm)
    monkeypatch.setattr(Runner, "_forward", watched)
    split = {"tensor_parallel_size": 2, "expert_parallel_size": 4, "sequence_parallel_size": 2}
    with serve(checkpoint("deepseek_v3"), **split, enable_dbo=True) as llm:
        assert said(llm) == expected
        assert llm.stats().compiles_after_warmup == 0
    assert {kind for kind, _ in kinds} == {"beginning", "forward"}


@pytest.mark.parametrize(
    ("model_type", "split", "message"),
    [
        ("qwen3", {**SPLIT, "expert_parallel_size": 1}, "latents.* 2 KV heads keep .* nearest"),
        ("deepseek_v3", {**SPLIT, "expert_parallel_size": 1}, "nearest .* expert_parallel_size=4"),
        ("deepseek_v3", {**SPLIT, "sequence_parallel_size": 2}, "sequence=2: .* nearest is"),
    ],
)
def test_a_spread_that_cannot_be_is_refused(model_type, split, message):
    with pytest.raises(ConfigError, match=message):
        serve(checkpoint(model_type), **split)


def real_layer(target: str, tokens: int) -> tuple[Any, Any, Plan]:
    """One layer of DeepSeek-V3 with its experts in a step of prompts, compiled for 32 devices."""
    f, hf = family("deepseek_v3"), DEEPSEEK
    cfg = f.config(hf)
    split = dict.fromkeys(SPLIT, 32)
    config = EngineConfig(
        max_num_batched_tokens=tokens, max_num_seqs=64, num_pages=1024, max_model_len=8192, **split
    )
    devices = compile_only.devices(target)
    plan = resolve(config, hf, cfg, lambda *_: 0, Absent(devices[0]))
    mesh = Mesh(np.array(devices).reshape(plan.parallelism.shape), AXES)
    declared, everywhere = f.declare_params(cfg), NamedSharding(mesh, PartitionSpec())
    places = shardings(declared, fitted(PREFILL, plan.parallelism), cfg.sizes, mesh)
    shapes = abstract(declared, cfg.sizes, plan.dtype)

    def there(a: Any, sharding: Any = everywhere) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    params = jax.tree.map(there, shapes, places)
    assert plan.dispatch is not None
    params = placed(params, plan.dispatch.layout.initial(cfg.num_layers), there)
    made = spread(program(plan, f, cfg, params, "beginning", tokens), plan, mesh)
    lowered = jax.jit(made.function, donate_argnums=made.donated).lower(*made.arguments)
    return lowered.compile(), cfg, plan


DEEPSEEK = {
    **MODELS["16b-mla"], "num_hidden_layers": 1, "first_k_dense_replace": 0,
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
}  # fmt: skip


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.timeout(900)  # it compiles for a minute, and longer on a busy machine
@pytest.mark.usefixtures("no_compilation_cache")
def test_bytes_of_deepseeks_attention_are_those_of_the_paper():
    """§7: 2,112 values of a token are gathered; 4 heads of 128 lanes on each device answer."""
    tokens, n = 8192, 32
    compiled, cfg, plan = real_layer("v5p:2x4x4", tokens)
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert "flash_attention" in hlo
    assert memory.alias_size_in_bytes >= plan.kv_bytes  # written where it lies
    assert cfg.q_lora + cfg.kv_lora + cfg.rope_dim == 2112
    found = collectives_of(hlo)
    gathered = Collective("all-gather", "bf16", tokens // n * 2112 * 2, n)
    exchanged = Collective("all-to-all", "bf16", tokens * 4 * 128 * 2, n)
    assert found.count(gathered) == 1
    assert found.count(exchanged) == 1
    received, sent = (n - 1) * gathered.num_bytes, (n - 1) * exchanged.num_bytes // n
    assert round(8192 / (tokens // n) * received / 1e9, 2) == 1.07
    assert round(8192 / (tokens // n) * sent / 1e6) == 260
