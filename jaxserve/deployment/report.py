"""A plan as numbers with names: what `jaxserve plan --json` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from jaxserve.deployment.cost import Waits
from jaxserve.deployment.prediction import Decode, Prefill, devices_per_accelerator, eight_bit
from jaxserve.deployment.search import Plan, batch_of


def as_dict(plan: Plan) -> dict[str, Any]:
    """One object of plain values.

    `batch` counts sequences of an accelerator, which is a two-die NPU on Ascend, as the paper
    counts, and a JAX device elsewhere; so do keys that end in `per_npu`. Those that end in
    `per_device` are about a JAX device.
    """
    decode, prefill = plan.decode, plan.prefill
    dies = devices_per_accelerator(plan.topology)
    return {
        "model": plan.shape.name,
        "topology": plan.topology.name,
        "devices": plan.topology.num_devices,
        "devices_per_npu": dies,
        "parallelism": asdict(decode.split),
        "batch": plan.batch,
        "prompt_len": plan.traffic.prompt_len,
        "output_len": plan.traffic.output_len,
        "weights": weights(plan),
        "memory_per_device_gb": _gb(decode.memory.total),
        "memory_gb": {name: _gb(size) for name, size in asdict(decode.memory).items()},
        "ttft_ms": _ms(prefill.ttft),
        "tpot_ms": _ms(decode.tpot),
        "in_time": plan.in_time,
        "tokens_per_step": decode.tokens,
        "tokens_per_s_per_device": round(decode.rate, 2),
        "decode_tokens_per_s_per_npu": round(decode.rate * dies, 1),
        "prefill_tokens_per_s_per_npu": round(prefill.rate * dies, 1),
        "binding": decode.binding,
        "microbatches": decode.layers.microbatches,
        "attention_cores": decode.layers.cores,
        "work_ms": {name: _ms(s) for name, s in _sorted(decode.waits)},
        "prefill": _prefill(prefill),
        "runner_up": _runner_up(plan, plan.runner_up) if plan.runner_up else None,
    }


def weights(plan: Plan) -> str:
    """What layers' matrices are held in."""
    eight = "int8" if plan.topology.chip.int8 else "fp8"
    return eight if eight_bit(plan.topology, plan.traffic) else "bfloat16"


def _prefill(prefill: Prefill) -> dict[str, Any]:
    return {
        "parallelism": asdict(prefill.split),
        "tokens_per_device": prefill.tokens,
        "step_ms": _ms(prefill.seconds),
        "handoff_ms": _ms(prefill.handoff),
        "memory_per_device_gb": _gb(prefill.memory.total),
    }


def _runner_up(plan: Plan, decode: Decode) -> dict[str, Any]:
    return {
        "parallelism": asdict(decode.split),
        "batch": batch_of(decode, plan.topology),
        "tpot_ms": _ms(decode.tpot),
        "tokens_per_s_per_device": round(decode.rate, 2),
        "memory_per_device_gb": _gb(decode.memory.total),
        "binding": decode.binding,
        "why": plan.why,
    }


def _sorted(waits: Waits) -> list[tuple[str, float]]:
    return sorted(waits.items(), key=lambda item: -item[1])


def _gb(num_bytes: float) -> float:
    return round(num_bytes / 1e9, 3)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
