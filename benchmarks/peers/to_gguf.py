"""A Qwen3 checkpoint as the GGUF file that llama.cpp reads: `to_gguf MODEL TYPE OUT`.

llama.cpp's own converter knows tokenizers by a hash of what they answer, and not the ones of our
random checkpoints. The drivers speak in token ids, so this file has no vocabulary but its size.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.utility import LocalTensor, SafetensorsLocal

ARCHITECTURES = {"qwen3": gguf.MODEL_ARCH.QWEN3, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}


def convert(model: Path, kind: Type, out: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[arch])
    _add_config(writer, config)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, data in _tensors(model):
        # Vectors and the router stay in float32, as llama.cpp has them.
        stored = Type.F32 if data.ndim == 1 or name.endswith("mlp.gate.weight") else kind
        ours = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(ours, gguf.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in float32; the experts of a layer come as one, stacked."""
    stored: dict[str, LocalTensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        stored |= SafetensorsLocal(path).tensors
    experts: dict[str, dict[int, str]] = {}
    for name, tensor in stored.items():
        if part := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name):
            experts.setdefault(f"{part[1]}.{part[3]}", {})[int(part[2])] = name
        else:
            yield name, _float32(tensor)
    for name, parts in experts.items():
        yield name, np.stack([_float32(stored[parts[i]]) for i in range(len(parts))])


def _float32(tensor: LocalTensor) -> np.ndarray:
    data = tensor.mmap_bytes()
    if tensor.dtype == "BF16":  # numpy has none: the upper half of a float32
        data = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        data = data.view({"F16": np.float16, "F32": np.float32}[tensor.dtype])
    return data.reshape(tensor.shape).astype(np.float32)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Type[sys.argv[2]], Path(sys.argv[3]))
