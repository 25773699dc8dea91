"""transformers on torch: static, left-padded batches of 16, each as long as its longest output."""

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.protocol import Loaded, Settings, serve

BATCH = 16


def load(settings: Settings) -> Loaded:
    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        outputs = []
        for i in range(0, len(prompts), BATCH):
            outputs += _batch(model, prompts[i : i + BATCH], lengths[i : i + BATCH])
        return outputs

    return Loaded(generate)


@torch.inference_mode()
def _batch(model, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(lengths),
        do_sample=False,
        pad_token_id=0,
    )
    return [row[width : width + n].tolist() for row, n in zip(out, lengths, strict=True)]


if __name__ == "__main__":
    serve(load, ["transformers", "torch"])
