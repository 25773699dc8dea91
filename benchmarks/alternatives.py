"""What else could compute a case: other libraries' ways, some of which do a little less.

An alternative is never handicapped: weights are taken out of their stacks, transposed or widened,
and keys of pages are decoded and laid out in a row, before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.torch_arrays import from_torch, to_torch
from kernels_pallas.linear import GATES
from kernels_pallas.op import Case, Op
from kernels_pallas.paged_attention.codec import Pages, rotated, take

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
    (x, w, sizes), _ = inputs
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
        kind = jnp.bfloat16 if eight else x.dtype
        weight = to_torch(_taken(w, arrays.get("layer")).astype(kind)).transpose(-1, -2)
        ends = to_torch(jnp.cumsum(sizes, dtype=jnp.int32))
        return to_torch(x.astype(kind)), weight, ends

    def torch_run(parts: Any) -> Any:
        import torch

        x, w, ends = parts
        product: Any = getattr(torch, "_grouped_mm")  # noqa: B009
        return product(x, w, offs=ends)

    if int(sizes.sum()) == x.shape[0] and x.dtype in (jnp.int8, jnp.bfloat16):  # it wants no others
        wide = "weights of two bytes; results rounded; without scales" if eight else ""
        yield Alternative("torch_grouped_mm", torch_grouped, torch_run, finish=finish, note=wide)


# ---- attention ----------------------------------------------------------------------------


def _implementations(platform: str) -> tuple[str, ...]:
    return ("cudnn", "xla") if platform == "gpu" else ("xla",)


def _page_attention(case: Case, inputs: Any, platform: str) -> Iterator[Alternative]:
    """Steps of sequences with one new token, and of prompts from their first one. Nobody else reads
    pages of rounded or of latent keys: these are decoded and laid in rows of the queries' type."""
    rows, scale = _Rows.of(case, inputs), case.options["scale"]
    if rows is None:
        return
    about = {"part": lambda expected: expected[0], "finish": rows.in_order}
    note = "keys in a row instead of in pages" + ", and no mass" * bool(case.options.get("mass"))
    if not rows.prompts:
        yield Alternative(
            "xla_rows", partial(rows.laid_out, heads_first=True), _each(partial(_rowwise, scale)),
            note=note, **about,
        )  # fmt: skip
    for implementation in () if rows.latent else _implementations(platform):
        nn = partial(
            jax.nn.dot_product_attention,
            scale=scale,
            implementation=implementation,  # type: ignore[arg-type]
        )

        def attend(q: Array, k: Array, v: Array, lens: Array, nn: Any = nn) -> Array:
            return nn(q[:, None], k, v, key_value_seq_lengths=lens)[:, 0]

        def prompt(q: Array, k: Array, v: Array, nn: Any = nn) -> Array:
            return nn(q[None], k[None], v[None], is_causal=True)[0]

        yield Alternative(
            f"jax.nn_{implementation}", rows.laid_out, _each(attend, prompt), note=note, **about
        )

    if not rows.even:
        return

    def torch_laid_out(inputs: Inputs) -> Any:
        return jax.tree.map(to_torch, rows.laid_out(inputs, heads_first=True))

    yield Alternative(
        "torch_sdpa", torch_laid_out,
        _each(partial(_torch_rowwise, scale, rows.latent), partial(_torch_prompt, scale)),
        note=f"{note}, all of one length", **about,
    )  # fmt: skip


def _each(attend: Any, prompt: Any = None) -> Callable[[Any], list[Any]]:
    """Attention of what `_Rows.laid_out` returns: of rows that decode, and of each prompt."""

    def run(parts: Any) -> list[Any]:
        ones, prompts = parts
        return [*(attend(*x) for x in ones), *(prompt(*x) for x in prompts)]

    return run


def _rowwise(scale: float, q: Array, k: Array, v: Array, lens: Array) -> Array:
    """Two products with a softmax in float32 between them: q [R, N, H], k and v [R, K, S, H]."""
    heads = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    s = jnp.einsum("rkgh,rksh->rkgs", heads, k, preferred_element_type=jnp.float32) * scale
    s = jnp.where(jnp.arange(k.shape[2]) < lens[:, None, None, None], s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    o = jnp.einsum("rkgs,rksv->rkgv", p, v, preferred_element_type=jnp.float32)
    return o.reshape(*q.shape[:2], -1)


def _torch_rowwise(scale: float, latent: bool, q: Any, k: Any, v: Any, _: Any) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    if latent:  # all heads share their keys: they are its queries
        return scaled_dot_product_attention(q[:, None], k, v, scale=scale)[:, 0]
    heads = q[:, :, None]
    return scaled_dot_product_attention(heads, k, v, scale=scale, enable_gqa=True)[:, :, 0]


def _torch_prompt(scale: float, q: Any, k: Any, v: Any) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = q.transpose(0, 1)[None], k[None], v[None]
    o = scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True)
    return o[0].transpose(0, 1)


@dataclass(frozen=True)
class _Rows:
    """A step's sequences, apart: those with one new token, and those that begin.

    Attributes:
        ones, prompts: sequences of either kind.
        starts: of each sequence's tokens.
        lens: of each sequence.
        dims: lanes of a key and of a value.
        latent: values are part of the keys.
        even: sequences that decode fill their pages.
    """

    ones: list[int]
    prompts: list[int]
    starts: list[int]
    lens: list[int]
    dims: tuple[int, int]
    latent: bool
    even: bool

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> _Rows | None:
        """None where a step has more to it than others compute."""
        (q, k_pages, v_pages, _, batch), arrays = inputs
        starts, lens = batch.row_starts.tolist(), batch.kv_lens.tolist()
        new = [end - start for start, end in pairwise(starts)]
        ones = [r for r, n in enumerate(new) if n == 1]
        prompts = [r for r, n in enumerate(new) if n > 1]
        begin = all(new[r] == lens[r] for r in prompts)
        latent = v_pages is None
        whole = int(batch.num_seqs) == len(new) and 0 not in new
        if arrays or case.options.get("soft_cap") or not (begin and whole) or (latent and prompts):
            return None
        values = case.options.get("value_dim") or (k_pages if latent else v_pages).shape[-1]
        row = batch.tables.shape[1] * k_pages.shape[3]
        dims = q.shape[-1], min(values, q.shape[-1])
        even = all(lens[r] == row for r in ones)
        return cls(ones, prompts, starts, lens, dims, latent, even)

    def laid_out(self, inputs: Inputs, *, heads_first: bool = False) -> Any:
        """Queries, keys, values and lengths of rows that decode (of none if none do), and queries,
        keys and values of each prompt."""
        (q, k_pages, v_pages, layer, batch), _ = inputs
        H, Hv = self.dims

        def rows(pages: Pages, r: Any, length: int, lanes: int) -> Array:  # [R, S, K, lanes]
            found = jnp.moveaxis(take(pages, layer, batch.tables[r]), 2, 3)  # [R, M, Z, K, W]
            found = found.reshape(len(r), -1, *found.shape[3:])[:, :length]
            found = rotated(pages, found)[..., :lanes].astype(q.dtype)
            return found.swapaxes(1, 2) if heads_first else found

        def both(r: Any, length: int) -> tuple[Array, Array]:
            keys = rows(k_pages, r, length, H)
            return keys, keys[..., :Hv] if self.latent else rows(v_pages, r, length, Hv)

        ones, prompts = np.array(self.ones, int), list[Any]()
        for r in self.prompts:
            start, n = self.starts[r], self.lens[r]
            prompts.append((q[start : start + n], *(x[0] for x in both(np.array([r]), n))))
        if not self.ones:
            return [], prompts
        k, v = both(ones, max(self.lens[r] for r in self.ones))
        return [(q[np.array(self.starts)[ones]], k, v, batch.kv_lens[ones])], prompts

    def in_order(self, found: list[Any], _: Inputs) -> Array:
        """What was computed apart, by tokens of the step."""
        tokens = [self.starts[r] for r in self.ones]
        tokens += [t for r in self.prompts for t in range(self.starts[r], self.starts[r + 1])]
        return jnp.concatenate([from_torch(x) for x in found])[np.argsort(tokens)]


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
