"""What else could compute a case: other libraries' ways, some of which do a little less.

An alternative is never handicapped: weights are taken out of their stacks, transposed or widened,
and keys of pages are laid out in a row, before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.torch_arrays import from_torch, to_torch
from kernels_pallas.linear import GATES
from kernels_pallas.op import Case, Op

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a case and its keyword arrays."""


@dataclass(frozen=True)
class Alternative:
    """One way, in JAX or in torch.

    Attributes:
        prepare: the case's inputs as this way wants them; not timed.
        run: is timed. Takes what `prepare` returns.
        part: of the reference's result, that which `run` computes.
        asked: inputs for which the reference says what `run` says, if not those of the case.
        finish: what `run` returned in the form of that part; not timed.
        work: how many times the operations of the op it does, if more.
        note: what it does less, or more.
    """

    name: str
    prepare: Callable[[Inputs], Any]
    run: Callable[[Any], Any]
    part: Callable[[Any], Any] = lambda expected: expected
    asked: Callable[[Inputs], Inputs] | None = None
    finish: Callable[[Any, Inputs], Any] = lambda out, inputs: out
    work: float = 1.0
    note: str = ""

    @property
    def uses_torch(self) -> bool:
        return self.name.startswith("torch")


def alternatives(op: Op, case: Case, inputs: Inputs, platform: str) -> Iterator[Alternative]:
    """What applies to a case with such inputs."""
    offered = {
        "int8_matmul": _int8_matmul,
        "grouped_matmul": _grouped_matmul,
        "linear": _linear,
        "page_attention": _page_attention,
        "flash_attention": partial(_flash_attention, backward=False),
        "flash_attention_gradient": partial(_flash_attention, backward=True),
    }
    if op.name in offered:
        yield from offered[op.name](case, inputs, platform)


# ---- products -----------------------------------------------------------------------------


def _taken(stack: Array | None, layer: Array | int | None) -> Any:
    return stack if stack is None or layer is None else stack[layer]


def _int8_parts(inputs: Inputs) -> tuple[Any, ...]:
    """x, its scales, and a layer's own weights with theirs: one pair, or two if gated."""
    (x, x_scale, w, w_scale), arrays = inputs
    layer = arrays.get("layer")
    pairs = [(w, w_scale), (arrays.get("up"), arrays.get("up_scale"))]
    pairs = [tuple(_taken(a, layer) for a in pair) for pair in pairs if pair[0] is not None]
    return x, x_scale, pairs


def _rescaled(sums: list[Any], inputs: Inputs, case: Case) -> Array:
    """Sums of products with the scales put back, which torch's product leaves out."""
    _, x_scale, pairs = _int8_parts(inputs)
    y = [
        s.astype(jnp.float32) * x_scale[:, None] * scale
        for s, (_, scale) in zip(sums, pairs, strict=True)
    ]
    activation = case.options.get("activation")
    return (GATES[activation](*y) if activation else y[0]).astype(case.options["out_dtype"])


def _int8_matmul(case: Case, inputs: Any, platform: str) -> Iterator[Alternative]:
    dims = (((1,), (1,)), ((), ()))

    def unstacked(parts: Any) -> Array:
        x, x_scale, pairs = parts
        y = [
            lax.dot_general(x, w, dims, preferred_element_type=jnp.int32).astype(jnp.float32)
            * x_scale[:, None] * scale
            for w, scale in pairs
        ]  # fmt: skip
        activation = case.options.get("activation")
        return (GATES[activation](*y) if activation else y[0]).astype(case.options["out_dtype"])

    if "bias" in inputs[1]:
        return
    yield Alternative("xla_unstacked", _int8_parts, unstacked, note="no stack of layers")

    def widened(inputs: Inputs) -> Any:
        x, _, pairs = _int8_parts(inputs)
        return x.astype(jnp.bfloat16), [w.astype(jnp.bfloat16) for w, _ in pairs]

    def products(parts: Any) -> list[Array]:
        x, weights = parts
        return [lax.dot_general(x, w, dims, preferred_element_type=jnp.float32) for w in weights]

    def finish(sums: list[Any], inputs: Inputs) -> Array:
        return _rescaled([from_torch(s) for s in sums], inputs, case)

    yield Alternative(
        "xla_bfloat16", widened, products, finish=finish,
        note="weights of two bytes; without scales and gate",
    )  # fmt: skip

    def torch_int8(inputs: Inputs) -> Any:
        x, _, pairs = _int8_parts(inputs)
        return to_torch(x), [to_torch(w).t() for w, _ in pairs]

    def torch_products(parts: Any) -> list[Any]:
        import torch

        product: Any = getattr(torch, "_int_mm")  # noqa: B009
        x, weights = parts
        return [product(x, w) for w in weights]

    if inputs[0][0].shape[0] > 16 or platform == "cpu":  # what torch wants on a GPU
        yield Alternative(
            "torch_int_mm", torch_int8, torch_products, finish=finish,
            note="without scales and gate",
        )  # fmt: skip

    def torch_bfloat16(inputs: Inputs) -> Any:
        x, weights = widened(inputs)
        return to_torch(x), [to_torch(w).t() for w in weights]

    yield Alternative(
        "torch_bfloat16", torch_bfloat16, lambda p: [p[0] @ w for w in p[1]],
        finish=finish, note="weights of two bytes; results rounded; without scales and gate",
    )  # fmt: skip


def _linear(case: Case, inputs: Inputs, platform: str) -> Iterator[Alternative]:
    stack = inputs[0][1].stack
    if not isinstance(stack, jax.Array):
        return  # int8: torch has no product that rounds rows as it goes

    def taken(inputs: Inputs) -> Any:
        x, w = inputs[0]
        return to_torch(x.astype(stack.dtype)), to_torch(w.take()).t()

    yield Alternative(
        "torch_linear", taken, lambda parts: parts[0] @ parts[1],
        finish=lambda y, _: from_torch(y).astype(jnp.float32), note="rows in the weights' type",
    )  # fmt: skip


def _grouped_matmul(case: Case, inputs: Any, platform: str) -> Iterator[Alternative]:
    (x, w, _), _ = inputs
    E, out = w.shape[-3], case.options["out_dtype"]
    eight = x.dtype == jnp.int8

    def turned(inputs: Inputs) -> Any:  # ragged_dot wants [E, K, N]
        (x, w, sizes), arrays = inputs
        return x, _taken(w, arrays.get("layer")).swapaxes(-1, -2), sizes

    def ragged(parts: Any) -> Array:
        total = jnp.int32 if eight else jnp.float32
        y = lax.ragged_dot(*parts, preferred_element_type=total)
        return y if eight else y.astype(out)

    def finish(y: Any, inputs: Inputs) -> Array:
        y, ((_, _, sizes), arrays) = from_torch(y), inputs
        if eight:
            expert = jnp.repeat(jnp.arange(E), sizes, total_repeat_length=y.shape[0])
            scale = _taken(arrays["w_scale"], arrays.get("layer"))[expert]
            y = y.astype(jnp.float32) * arrays["x_scale"][:, None] * scale
        return y.astype(out)

    dense = 1 if platform == "tpu" else E
    note = "without scales" if eight else ""
    yield Alternative("xla_ragged_dot", turned, ragged, finish=finish, work=dense, note=note)

    def torch_grouped(inputs: Inputs) -> Any:
        (x, w, sizes), arrays = inputs
        weight = to_torch(_taken(w, arrays.get("layer"))).transpose(-1, -2)
        return to_torch(x), weight, to_torch(jnp.cumsum(sizes, dtype=jnp.int32))

    def torch_run(parts: Any) -> Any:
        import torch

        x, w, ends = parts
        product: Any = getattr(torch, "_grouped_mm")  # noqa: B009
        return product(x, w, offs=ends)

    if not eight and platform == "gpu":
        yield Alternative("torch_grouped_mm", torch_grouped, torch_run, finish=finish)


# ---- attention ----------------------------------------------------------------------------


def _implementations(platform: str) -> tuple[str, ...]:
    return ("cudnn", "xla") if platform == "gpu" else ("xla",)


def _page_attention(case: Case, inputs: Any, platform: str) -> Iterator[Alternative]:
    """Decoding only: all sequences have one new token. Nobody else reads rounded pages."""
    (q, k_pages, v_pages, _, batch), arrays = inputs
    (T, _, H), (R, M) = q.shape, batch.tables.shape
    decodes = T == R and not (case.options.get("mass") or arrays)
    if not decodes or not (isinstance(k_pages, Array) and isinstance(v_pages, Array)):
        return
    S, scale = M * k_pages.shape[3], case.options["scale"]

    def laid_out(inputs: Inputs) -> Any:
        (q, k_pages, v_pages, layer, batch), _ = inputs

        def rows(pages: Array) -> Array:  # [R, S, K, H]
            found = pages[layer][batch.tables]  # [R, M, K, Z, W]
            return jnp.moveaxis(found, 2, 3).reshape(R, S, -1, pages.shape[-1])[..., :H]

        return q[:, None], rows(k_pages), rows(v_pages), batch.kv_lens

    note = "keys in a row instead of in pages"
    for implementation in _implementations(platform):

        def attend(parts: Any, implementation: Any = implementation) -> Array:
            q, k, v, lens = parts
            return jax.nn.dot_product_attention(
                q, k, v, scale=scale, key_value_seq_lengths=lens, implementation=implementation
            )[:, 0]

        yield Alternative(
            f"jax.nn_{implementation}", laid_out, attend,
            part=lambda expected: expected[0], note=note,
        )  # fmt: skip

    if int(batch.kv_lens.min()) < S:
        return

    def torch_laid_out(inputs: Inputs) -> Any:
        q, k, v, _ = laid_out(inputs)
        return tuple(to_torch(jnp.moveaxis(x, 1, 2)) for x in (q, k, v))

    def torch_attend(parts: Any) -> Any:
        from torch.nn.functional import scaled_dot_product_attention

        return scaled_dot_product_attention(*parts, scale=scale, enable_gqa=True)

    yield Alternative(
        "torch_sdpa", torch_laid_out, torch_attend, part=lambda expected: expected[0],
        finish=lambda o, _: from_torch(o)[:, :, 0], note=f"{note}, all of one length",
    )  # fmt: skip


def _lse_level(inputs: Inputs) -> Inputs:
    args, arrays = inputs
    return (*args[:7], jnp.zeros_like(args[7])), arrays


def _flash_attention(
    case: Case, inputs: Any, platform: str, *, backward: bool
) -> Iterator[Alternative]:
    """Rows of one document each, without sinks or caps, which is what others compute."""
    if inputs[1] or case.options.get("soft_cap") or not bool(jnp.all(inputs[0][3] == 1)):
        return
    window, scale = case.options.get("window", 0), case.options["scale"]

    def forward(implementation: str, q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True,
            implementation=implementation,  # type: ignore[arg-type]
            local_window_size=(window - 1, 0) if window else None,
        )  # fmt: skip

    def tokens_first(inputs: Inputs) -> Any:  # [B, T, N, H]
        return tuple(x.swapaxes(1, 2) for x in inputs[0][:3])

    def heads_first(out: Any, _: Inputs) -> Any:
        return jax.tree.map(lambda x: from_torch(x).swapaxes(1, 2), out)

    for implementation in _implementations(platform):
        name, run = f"jax.nn_{implementation}", partial(forward, implementation)
        if not backward:
            yield Alternative(
                name, tokens_first, lambda parts, run=run: run(*parts),
                part=lambda expected: expected[0], finish=heads_first,
            )  # fmt: skip
            continue

        def residuals(inputs: Inputs, run: Any = run) -> Any:
            pull = jax.jit(lambda *x: jax.vjp(run, *x)[1])(*tokens_first(inputs))
            return pull, inputs[0][6].swapaxes(1, 2)

        yield Alternative(
            name, residuals, lambda parts: parts[0](parts[1]),
            part=lambda expected: expected[:3], finish=heads_first,
            asked=_lse_level, note="no slope of the lse",
        )  # fmt: skip
    if window:
        return

    def torch_forward(parts: Any) -> Any:
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = parts
        return scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True)

    def torch_inputs(inputs: Inputs) -> Any:
        return tuple(to_torch(x) for x in inputs[0][:3])

    def torch_residuals(inputs: Inputs) -> Any:
        leaves = tuple(x.detach().requires_grad_() for x in torch_inputs(inputs))
        return leaves, torch_forward(leaves), to_torch(inputs[0][6])

    def torch_backward(parts: Any) -> Any:
        import torch

        leaves, out, do = parts
        return torch.autograd.grad(out, leaves, do, retain_graph=True)

    if backward:
        yield Alternative(
            "torch_sdpa", torch_residuals, torch_backward, part=lambda expected: expected[:3],
            finish=lambda out, _: tuple(map(from_torch, out)), asked=_lse_level,
            note="no slope of the lse",
        )  # fmt: skip
    else:
        yield Alternative(
            "torch_sdpa", torch_inputs, torch_forward, part=lambda expected: expected[0],
            finish=lambda o, _: from_torch(o),
        )  # fmt: skip
