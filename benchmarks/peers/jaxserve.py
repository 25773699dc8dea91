"""jaxserve itself, with its defaults but for the context length."""

from benchmarks.peers.protocol import Loaded, Settings, serve


def load(settings: Settings) -> Loaded:
    """Threads are the cores that this process may run on, which is all XLA asks for."""
    from jaxserve import LLM, SamplingParams

    eight = settings.dtype == "int8"
    kind = {"quantization": "int8"} if eight else {"dtype": settings.dtype}
    llm = LLM(settings.model, max_model_len=settings.max_len, **kind)

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        done = llm.generate(requests, params)
        return [list(request.outputs[0].token_ids) for request in done]

    return Loaded(generate, llm.wait_until_warm)


if __name__ == "__main__":
    serve(load, ["jax", "jaxlib"])
