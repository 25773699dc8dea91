"""What all ops share: their bodies, how one is chosen, and the gradient of a kernel without one."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas import tuning
from kernels_pallas.target import Platform, Target


class UnsupportedError(NotImplementedError):
    """A body does not support these shapes, types or options. An op then tries the next one."""


def refuse_no_rows(count: int) -> None:
    """Refuses arrays without rows: a kernel's grid would be of no blocks, and their size 0.

    Raises:
        UnsupportedError: there are none.
    """
    if count == 0:
        raise UnsupportedError("0 rows: at least one makes a block")


def tried(default: int, *others: int) -> Any:
    """A field of a tile: its default, and the other values that tuning tries."""
    return field(default=default, metadata={"tried": (default, *others)})


@dataclass(frozen=True)
class NoTile:
    """The tile of a body that has no sizes to choose."""


@dataclass(frozen=True)
class Body:
    """One implementation of an op.

    Attributes:
        platform: where it runs.
        run: takes the op's arguments and options, `tile` (of the type below, or None for the body's
            own choice) and `interpret`. It raises `UnsupportedError` while it is traced if it does
            not support them.
        tile: the type of its tile: a frozen dataclass of integers with defaults. Fields made by
            `tried` are tuned.
        wanted: device -> the tile to use where none was tuned, or None for the body's own choice.
        declines: device -> why the body cannot run there although the platform is its own, or
            None. Asked before tracing: a compiler can only fail, and may end the process.
    """

    platform: Platform
    run: Callable[..., Any]
    tile: type
    wanted: Callable[[str], Any] = lambda device: None
    declines: Callable[[str], str | None] = lambda device: None

    def tiles(self, device: str) -> Iterator[Any]:
        """What tuning tries on a device: every combination of tried values over the wanted tile,
        including the wanted tile itself. Nothing if no field is tried."""
        choices = {
            f.name: f.metadata["tried"] for f in fields(self.tile) if f.metadata.get("tried")
        }
        wanted = self.wanted(device) or self.tile()
        if choices:
            for sizes in itertools.product(*choices.values()):
                yield replace(wanted, **dict(zip(choices, sizes, strict=True)))


@dataclass(frozen=True)
class Cost:
    """The least work of a case, which bounds its time from below.

    Attributes:
        bytes: that must be read and written.
        flops: multiplications and additions, counted separately.
        dtype: of the factors, which decides the peak rate.
    """

    bytes: float
    flops: float = 0.0
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Case:
    """Shapes at which an op is tested, timed and tuned.

    Attributes:
        make: key -> (args, keyword arrays). It can be traced, since a compiler for absent hardware
            is given shapes only.
        options: static options.
        shipped: whether users meet this size: it is then compiled for every target, and timed.
            Others are small enough to be simulated, which takes milliseconds per step of a grid.
        cost: of a shipped case.
        tolerance: largest error, relative to the largest value of the reference; 0 for equality.
        bodies: the bodies that support it; None for all.
    """

    name: str
    make: Callable[[Array], tuple[tuple[Any, ...], dict[str, Any]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    shipped: bool = False
    cost: Cost | None = None
    tolerance: float = 1e-5
    bodies: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Op:
    """A reference, the bodies that must agree with it, and the cases that test them.

    Attributes:
        reference: plain JAX, on any platform. Its docstring is the contract.
        bodies: by name, the preferred one first: "mosaic_tpu", "mosaic_gpu", or "xla" for a faster
            form in plain JAX.
        in_place: pairs of numbers: of an argument, and of the result that is written into it. Such
            an argument is copied unless the caller donates it.
        differentiate: takes a body's function and the target, and returns the function with a
            gradient; None if bodies have none. JAX differentiates the reference by itself.
        check: takes the op's arguments, and raises ValueError if they do not go together.
    """

    name: str
    reference: Callable[..., Any]
    bodies: Mapping[str, Body]
    cases: tuple[Case, ...]
    in_place: tuple[tuple[int, int], ...] = ()
    differentiate: Callable[[Callable[..., Any], Target], Callable[..., Any]] | None = None
    check: Callable[..., Any] | None = None

    def case(self, name: str) -> Case:
        """The case of that name.

        Raises:
            KeyError: there is none.
        """
        found = {case.name: case for case in self.cases}
        if name not in found:
            raise KeyError(f"{self.name} has no case {name!r}; there are {', '.join(found)}")
        return found[name]

    def __call__(
        self, *args: Any, target: Target, implementation: str | None = None, **options: Any
    ) -> Any:
        """The result of the best body for `target`, or of the named `implementation`.

        Raises:
            TypeError: the target is none, or the reference has no such argument or option.
            ValueError: the arguments do not go together.
            UnsupportedError: neither a body nor the reference supports these arguments, or the
                named one does not.
        """
        if not isinstance(target, Target):
            raise TypeError(
                f"{self.name}: target is {target!r}: expected a Target, such as Target('cpu') or "
                "Target.of(jax.devices()[0])"
            )
        if self.check is not None:
            self.check(*args, **options)
        won, sizes = None, dict[str, int]()
        if target.device:
            won, sizes = tuning.tuned(target.device, self.name, self.signature(*args, **options))
        declined = dict[str, str]()
        for name in self._candidates(target, implementation, won):
            body, tile = self.bodies.get(name), None
            if body is not None:
                if reason := body.declines(target.device):
                    declined[name] = reason
                    continue
                tile = body.tile(**sizes) if name == won and sizes else body.wanted(target.device)
            try:
                run = functools.partial(self.run, name, tile=tile)
                if self.differentiate is not None and name != "reference":
                    run = self.differentiate(run, target)
                return run(*args, **options)
            except UnsupportedError as error:
                declined[name] = str(error)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in declined.items())
        raise UnsupportedError(f"{self.name}: nothing can run this. {reasons}")

    def run(self, name: str, *args: Any, tile: Any = None, interpret: Any = False, **options: Any):
        """The result of one implementation: a body, by name, or "reference".

        Args:
            tile: of the body's type; None for the body's own choice.
            interpret: as `jax.experimental.pallas` takes it, to simulate the kernel.

        Raises:
            UnsupportedError: the body does not support these arguments.
        """
        if name == "reference":
            return self.reference(*args, **options)
        body = self.bodies[name]
        if body.platform == "gpu" and not interpret:
            return _lowered_once(body.run, args, tile, options)
        return body.run(*args, tile=tile, interpret=interpret, **options)

    def signature(self, *args: Any, **options: Any) -> str:
        """`signature` of a call of this op, however its arguments are passed."""
        call = inspect.signature(self.reference).bind(*args, **options)
        call.apply_defaults()
        return signature(*call.args, **call.kwargs)

    def _candidates(self, target: Target, named: str | None, won: str | None) -> list[str]:
        """What is tried, in order: what was fastest when measured, then in the op's own order."""
        known = [*self.bodies, "reference"]
        if named is not None:
            if named not in known:
                raise UnsupportedError(f"{self.name}: implementation={named!r}, not in {known}")
            return [named]
        here = [n for n, body in self.bodies.items() if body.platform == target.platform]
        return sorted([*here, "reference"], key=lambda name: name != won)


def _lowered_once(run: Callable[..., Any], args: Any, tile: Any, options: dict[str, Any]) -> Any:
    """run(*args), traced and lowered once for the same types, tile and fixed options.

    Layers of a step on a GPU are unrolled, and a Hopper kernel takes a second to lower: without
    this, that would take most of an engine's start.
    """
    arrays = {
        name: value for name, value in options.items()
        if any(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(value))
    }  # fmt: skip
    fixed = tuple((k, options[k]) for k in sorted(options) if k not in arrays)
    return _jitted(run, tile, fixed)(*args, **arrays)


@functools.cache
def _jitted(run: Callable[..., Any], tile: Any, fixed: tuple[tuple[str, Any], ...]) -> Any:
    """A function that JAX caches the lowering of: the same one for the same arguments."""
    return jax.jit(functools.partial(run, tile=tile, **dict(fixed)))


def signature(*args: Any, **options: Any) -> str:
    """Types and shapes of arguments as one string, the key of tuned tables.

    It includes options that change what is computed: arrays, strings, types, and flags that are
    True. Numbers and scalars, such as a scale or the index of a layer, are left out.
    """
    words = [_described(x) for x in jax.tree.leaves(args) if np.ndim(x)]
    for name, value in sorted(options.items()):
        if isinstance(value, str | type | np.dtype):
            words.append(f"{name}={value if isinstance(value, str) else jnp.dtype(value).name}")
        elif value is True:
            words.append(name)
        words += [f"{name}={_described(x)}" for x in jax.tree.leaves(value) if np.ndim(x)]
    return " ".join(words)


def _described(x: Any) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def with_reference_gradient(
    kernel: Callable[..., Any], reference: Callable[..., Any], **context: Any
) -> Callable[..., Any]:
    """`kernel` with the gradient of `reference`, which is recomputed from the arguments.

    Both take the same arguments and return the same types. Options that are plain numbers or
    strings stay static; all others may be differentiated.

    Args:
        context: integer arrays that only the kernel is given, such as how many rows are real. They
            are arguments, since a backward pass cannot close over values of a forward pass.
    """

    def op(*args: Any, **options: Any) -> Any:
        fixed = {k: v for k, v in options.items() if isinstance(v, int | float | str | None)}
        traced = {k: v for k, v in options.items() if k not in fixed}

        @jax.custom_vjp
        def call(args: Any, traced: Any, context: Any) -> Any:
            return kernel(*args, **traced, **fixed, **context)

        def forward(*operands: Any) -> tuple[Any, Any]:
            return call(*operands), operands

        def backward(operands: Any, cotangent: Any) -> Any:
            args, traced, context = operands

            def plain(args: Any, traced: Any) -> Any:
                args, traced = jax.tree.map(jnp.asarray, (args, traced))  # constants may be numpy's
                return reference(*args, **traced, **fixed)

            _, pull = jax.vjp(plain, args, traced)
            return *pull(cotangent), jax.tree.map(_no_gradient, context)

        call.defvjp(forward, backward)
        return call(args, traced, context)

    return op


def _no_gradient(x: Array) -> Any:
    """The gradient of an array of integers."""
    return np.zeros(x.shape, jax.dtypes.float0)
