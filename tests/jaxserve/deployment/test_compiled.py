"""The engine's decoding step compiled for slices that are not there."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from jaxserve.deployment import compiled, shapes
from jaxserve.deployment.compiled import Step, compile_step
from jaxserve.deployment.shapes import Shape
from jaxserve.errors import ConfigError
from sharding.hardware import named
from sharding.mesh import Parallelism


def shallow(name: str, layers: int) -> Shape:
    """A published shape with fewer layers; of DeepSeek's, the first is dense."""
    shape = shapes.read(name)
    hf = {**shape.hf, "num_hidden_layers": layers}
    if "first_k_dense_replace" in hf:
        hf["first_k_dense_replace"] = 1
    return dataclasses.replace(shape, hf=hf, cfg=shape.family.config(hf))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize(
    ("model", "target", "split", "share"),
    [
        ("qwen3-30b-a3b", "v5p:2x2x2", Parallelism(data=8, expert=8), 0.3),
        ("deepseek-r1", "v5p:2x4x4", Parallelism(data=32, expert=32), 0.3),
    ],
)
def test_it_fits_sends_what_was_predicted_and_computes_meanwhile(
    model: str, target: str, split: Parallelism, share: float
):
    """Of four layers: a head weighs as much as they do, and it has no collective to lie under."""
    step = Step(sequences=32, context=4096)
    found = compile_step(shallow(model, 4), named(target), split, step).as_dict()
    assert found["devices"] == split.num_devices
    assert found["fits"]
    held = found["weight_bytes"] + found["kv_bytes"]
    assert held < found["bytes_per_device"] < 1.2 * held + (2 << 30)
    sent = [
        {k: c[k] for k in ("kind", "dtype", "num_bytes", "count")}
        for c in found["collectives"]
        if c["kind"] == "ragged-all-to-all"
    ]
    assert sorted(sent, key=str) == sorted(found["predicted_collectives"], key=str)
    assert all(c["group_size"] == split.expert for c in found["collectives"])
    assert found["overlapped_flops_share"] > share


@pytest.mark.parametrize(
    ("kind", "devices", "way"),
    [("TPU v5", 32, "ragged"), ("TPU v5 lite", 16, "ragged"), ("TPU v5 lite", 32, "padded")],
)
def test_rows_travel_as_the_slice_can_send_them(kind: str, devices: int, way: str):
    """And collectives are asked to go on by themselves where the compiler has such."""

    class Device:
        platform, device_kind = "tpu", kind

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 1 << 40}

    split = Parallelism(data=devices, expert=devices)
    plan = compiled._resolve(shallow("qwen3-30b-a3b", 2), split, Step(8, 1024), Device())
    assert plan.dispatch is not None
    assert plan.dispatch.transport.way == way
    assert (plan.compiler_options is None) == (way == "padded")


def test_what_cannot_be_compiled_is_refused_before_it_is_tried():
    shape = shapes.read("qwen3-30b-a3b")
    with pytest.raises(ConfigError, match="no compiler for it; take a TPU slice"):
        compile_step(shape, named("cm384-decode"), Parallelism(320, 320), Step(8, 1024))


def test_a_step_that_does_not_fit_is_refused_in_the_compilers_words():
    class Large:
        def compile(self, **_: object) -> None:
            said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 156.80G exceeds 95.74G.\nMore"
            raise jax.errors.JaxRuntimeError(said)

    with pytest.raises(ConfigError, match=r"156.80G exceeds 95.74G\. Lower --batch"):
        compiled._compiled(Large(), named("v5p:2x2x2"))


@pytest.mark.aot
def test_weights_that_do_not_fit_are_refused_with_numbers():
    shape = shapes.read("deepseek-r1")
    with pytest.raises(ConfigError, match=r"weights take .* GiB .* but the device has 15.75 GiB"):
        compile_step(shape, named("v5e:4x4"), Parallelism(16, 16), Step(8, 1024))
