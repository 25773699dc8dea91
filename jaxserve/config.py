"""What was asked of an engine; `plan.py` decides the rest. Every field has a default."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from jaxserve.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "bfloat16", "int8", "int4")
STORED = ("compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "mxfp4")
"""Quantisations that a checkpoint brings, by `quant_method` of its config.json."""

_DTYPES_OF_OTHERS = {"half": "float16", "float": "float32"}
"""What vLLM also calls types."""

OTHER_NAMES = {
    "gpu_memory_utilization": "here it is memory_utilization",
    "block_size": "here it is page_size",
    "num_gpu_blocks_override": "here it is num_pages",
    "kv_cache_memory_bytes": "here it is num_pages, or memory_utilization",
    "torch_dtype": "here it is dtype",
    "device_map": "here it is tensor_parallel_size",
    "pipeline_parallel_size": "here layers stay together; use tensor_parallel_size",
    "enable_expert_parallel": "here it is expert_parallel_size, a number of devices",
    "enable_eplb": "here it is eplb_step_interval, a number of steps",
    "load_in_8bit": "here it is quantization='int8'",
    "calculate_kv_scales": "here rounded keys and values find their own; leave it out",
    "enforce_eager": "here every step is a compiled program; leave it out",
    "enable_chunked_prefill": "here long prompts always come in chunks; leave it out",
    "trust_remote_code": "here code of checkpoints never runs; leave it out",
}
"""Settings that vLLM or transformers have, and what to write instead of them."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings in vLLM's names; None lets the plan choose.

    Attributes:
        dtype: of weights and cache; "auto" is the checkpoint's own, where the device is good at it.
        kv_cache_dtype: of keys and values: "int8" halves the cache of bfloat16, as vLLM's "fp8"
            would, which there is not; "int4" takes a quarter; "auto" keeps them as `dtype`.
        quantization: "int8": large weights in eight bits, and activations token by token; another
            name confirms what the checkpoint is stored in, and is refused where that is not so;
            None: as it is stored, float8 and mxfp4 as floats.
        max_model_len: longest prompt and output together.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step.
        page_size: tokens per page of the cache.
        num_pages: of the cache; overrides `memory_utilization`.
        memory_utilization: share of the device's memory for weights and cache.
        tensor_parallel_size: devices that split heads and wide layers among them.
        data_parallel_size: replicas of attention, each with requests and a cache of its own;
            None: as many as `expert_parallel_size` asks for.
        expert_parallel_size: devices that split the experts among them.
        sequence_parallel_size: 1, or `tensor_parallel_size`: those devices then split a step's
            tokens among them outside of attention, which reads prompts with less communication.
        num_redundant_experts: further places for copies of the experts that are asked for most.
        eplb_step_interval: steps after which experts move to where they are asked for (expert
            parallel load balancing), again and again; None: only `LLM.rebalance_experts` moves any.
        enable_dbo: dual batch overlap: halves of a step take turns, so that one computes while the
            other's tokens travel to experts and back.
        reward_head: file of a reward head for searches, in the model's folder if it names no other;
            None: `reward_head.safetensors`, where there is one.
        enable_return_routed_experts: note which experts each token of a search's path visits.
        enable_route_noise: let searches route a token in several ways and mix what comes of it
            (`RouteNoise`, the setting `route` of hyper); has programs of its own.
        seed: of requests that bring none.
        enable_prefix_caching: reuse pages of equal prompt beginnings.
        disable_cascade_attn: sequences that begin with the same pages each read them by themselves.
        decode_steps: tokens decoded per launch when every row decodes and none needs the host.
        kernels: "native" (C++ on CPU), "pallas" (TPU, GPU), "reference" (plain XLA), or "auto".
        load_format: "dummy" fills weights with random numbers instead of reading them.
        background_compile: serve with the first program while the others are compiled.
        forbid_compile: after warm-up, any compilation is an error.
        progress: show bars and the plan on the terminal.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: Literal["auto", "bfloat16", "int8", "int4"] = "auto"
    quantization: (
        Literal["int8", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "mxfp4"] | None
    ) = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    data_parallel_size: int | None = None
    expert_parallel_size: int = 1
    sequence_parallel_size: int = 1
    num_redundant_experts: int = 0
    eplb_step_interval: int | None = None
    enable_dbo: bool = False
    reward_head: str | None = None
    enable_return_routed_experts: bool = False
    enable_route_noise: bool = False
    seed: int = 0
    enable_prefix_caching: bool = True
    disable_cascade_attn: bool = False
    decode_steps: int = 1
    kernels: Literal["auto", "native", "pallas", "reference"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    background_compile: bool = True
    forbid_compile: bool = False
    progress: bool = True

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """The configuration with these fields.

        Raises:
            ConfigError: there is no such field, or it cannot have that value.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            name = unknown[0]
            near = difflib.get_close_matches(name, known, 1)
            says = OTHER_NAMES.get(name) or (f"did you mean {near[0]}?" if near else "")
            if not says:
                says = f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown setting {name!r}; {says}")
        return cls(**dict(settings) | {"dtype": _named(settings.get("dtype", cls.dtype))})

    def __post_init__(self) -> None:
        for name, (kind, fits, expected) in _RULES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, kind) or not fits(value):
                raise ConfigError(f"{name}={reprlib.repr(value)} must be {expected}")


def _named(dtype: Any) -> Any:
    """A type by the name that `DTYPES` has, whether it is jax's, numpy's or torch's, or vLLM's name
    for it."""
    if dtype is not None and not isinstance(dtype, str):
        dtype = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    dtype = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    return _DTYPES_OF_OTHERS.get(dtype, dtype)


_Rule = tuple[type, Callable[[Any], bool], str]  # its kind, what else it must fulfil, in words
_COUNT: _Rule = (Integral, lambda n: n >= 1, "a whole number, at least 1")
_FLAG: _Rule = (bool, lambda _: True, "true or false")

_RULES: dict[str, _Rule] = {
    "dtype": (str, lambda d: d in DTYPES, f"one of {', '.join(DTYPES)}"),
    "kv_cache_dtype": (
        str,
        lambda d: d in KV_DTYPES,
        f"one of {', '.join(KV_DTYPES)}; int8 is as small as float8, of which there are no pages",
    ),
    "quantization": (
        str,
        lambda q: q == "int8" or q in STORED,
        f"int8, or what the checkpoint is stored in ({', '.join(STORED)}), or nothing",
    ),
    "max_model_len": _COUNT,
    "max_num_seqs": _COUNT,
    "max_num_batched_tokens": _COUNT,
    "page_size": (Integral, lambda n: n >= 8 and n & (n - 1) == 0, "a power of two, at least 8"),
    "num_pages": _COUNT,
    "memory_utilization": (Real, lambda share: 0 < share <= 1, "in (0, 1]"),
    "tensor_parallel_size": _COUNT,
    "data_parallel_size": _COUNT,
    "expert_parallel_size": _COUNT,
    "sequence_parallel_size": _COUNT,
    "num_redundant_experts": (Integral, lambda n: n >= 0, "a whole number, at least 0"),
    "eplb_step_interval": _COUNT,
    "enable_dbo": _FLAG,
    "enable_return_routed_experts": _FLAG,
    "enable_route_noise": _FLAG,
    "reward_head": (str, lambda file: bool(file), "a file"),
    "seed": (Integral, lambda _: True, "a whole number"),
    "enable_prefix_caching": _FLAG,
    "disable_cascade_attn": _FLAG,
    "decode_steps": (Integral, lambda n: 1 <= n <= 64, "between 1 and 64"),
    "kernels": (
        str,
        lambda k: k in ("auto", "native", "pallas", "reference"),
        "auto, native, pallas or reference",
    ),
    "load_format": (str, lambda f: f in ("auto", "dummy"), "auto or dummy"),
    "background_compile": _FLAG,
    "forbid_compile": _FLAG,
    "progress": _FLAG,
}
"""What each field of `EngineConfig` may be."""

_OPTIONAL = {
    "data_parallel_size",
    "eplb_step_interval",
    "quantization",
    "reward_head",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "page_size",
    "num_pages",
}
