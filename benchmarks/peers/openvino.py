"""OpenVINO GenAI's continuous batching; the checkpoint is converted once, beside itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.protocol import Loaded, Settings, serve

CACHE_GIB = 2
PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "bf16"}


def load(settings: Settings) -> Loaded:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.enable_prefix_caching = True
    hints = {
        "INFERENCE_PRECISION_HINT": PRECISION[settings.dtype],
        "INFERENCE_NUM_THREADS": settings.threads,
    }
    folder = str(_converted(Path(settings.model), settings.dtype == "int8"))
    pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", hints)

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        ids = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        done = pipeline.generate(ids, [_greedy(n) for n in lengths])
        return [list(request.m_generation_ids[0]) for request in done]

    return Loaded(generate)


def _greedy(length: int) -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = length
    config.ignore_eos = True
    config.do_sample = False
    return config


def _converted(model: Path, eight_bits: bool) -> Path:
    """Float32 on disk, where the precision hint decides what is computed and kept in memory; or
    weights in eight bits, whose inputs OpenVINO rounds to eight bits by itself."""
    folder = model.with_name(model.name + ("-openvino-int8" if eight_bits else "-openvino"))
    if not (folder / "openvino_model.xml").exists():
        export = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
        task = ["--task", "text-generation-with-past"]
        kind = ["--weight-format", "int8" if eight_bits else "fp32"]
        subprocess.run([*export, "--model", str(model), *task, *kind, str(folder)], check=True)
    return folder


if __name__ == "__main__":
    serve(load, ["openvino", "openvino-genai"])
