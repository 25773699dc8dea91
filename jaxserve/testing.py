"""Seeded random checkpoints of every served family, in Hugging Face's on-disk format.

A family is one row: its published config and a function that lists (weight name, shape). Values
depend on the seed and the weight's name only, so shards, dtypes and extra layers change no other
weight. No torch and no network: tests, the demo and the benchmarks all start here.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Config = dict[str, Any]
Weight = tuple[str, tuple[int, ...]]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""gpt_oss with `quantization_config=MXFP4` stores its experts as blocks and scales."""


# ---- which weights a family has -----------------------------------------------------------


def _linear(name: str, out: int, into: int, bias: bool = False) -> Iterator[Weight]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _attention(c: Config, qkv_bias: bool = False, qk_norm: bool = False) -> Iterator[Weight]:
    D, N, K = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    H, bias = c.get("head_dim") or D // N, c.get("attention_bias", False)
    for name, heads in (("q", N), ("k", K), ("v", K)):
        yield from _linear(f"self_attn.{name}_proj", heads * H, D, bias or qkv_bias)
    yield from _linear("self_attn.o_proj", D, N * H, bias)
    if qk_norm:
        yield "self_attn.q_norm.weight", (H,)
        yield "self_attn.k_norm.weight", (H,)


def _latent_attention(c: Config) -> Iterator[Weight]:
    D, N, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    if c["q_lora_rank"] is None:
        yield from _linear("self_attn.q_proj", N * (nope + rope), D)
    else:
        yield from _linear("self_attn.q_a_proj", c["q_lora_rank"], D)
        yield "self_attn.q_a_layernorm.weight", (c["q_lora_rank"],)
        yield from _linear("self_attn.q_b_proj", N * (nope + rope), c["q_lora_rank"])
    yield from _linear("self_attn.kv_a_proj_with_mqa", rank + rope, D)
    yield "self_attn.kv_a_layernorm.weight", (rank,)
    yield from _linear("self_attn.kv_b_proj", N * (nope + value), rank)
    yield from _linear("self_attn.o_proj", D, N * value)


def _sink_attention(c: Config) -> Iterator[Weight]:
    yield from _attention(c)
    yield "self_attn.sinks", (c["num_attention_heads"],)


def _swiglu(name: str, c: Config, F: int, bias: bool = False) -> Iterator[Weight]:
    yield from _linear(f"{name}.gate_proj", F, c["hidden_size"], bias)
    yield from _linear(f"{name}.up_proj", F, c["hidden_size"], bias)
    yield from _linear(f"{name}.down_proj", c["hidden_size"], F, bias)


def _dense_mlp(c: Config, i: int) -> Iterator[Weight]:
    return _swiglu("mlp", c, c["intermediate_size"], c.get("mlp_bias", False))


def _qwen_moe(c: Config, i: int) -> Iterator[Weight]:
    if i in c["mlp_only_layers"] or (i + 1) % c["decoder_sparse_step"]:
        yield from _dense_mlp(c, i)
        return
    yield from _linear("mlp.gate", c["num_experts"], c["hidden_size"])
    for e in range(c["num_experts"]):
        yield from _swiglu(f"mlp.experts.{e}", c, c["moe_intermediate_size"])


def _mixtral_moe(c: Config, i: int) -> Iterator[Weight]:
    D, F = c["hidden_size"], c["intermediate_size"]
    yield from _linear("block_sparse_moe.gate", c["num_local_experts"], D)
    for e in range(c["num_local_experts"]):
        for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
            yield f"block_sparse_moe.experts.{e}.{name}.weight", shape


def _deepseek_moe(c: Config, i: int) -> Iterator[Weight]:
    if i < c["first_k_dense_replace"]:
        yield from _dense_mlp(c, i)
        return
    F = c["moe_intermediate_size"]
    yield from _linear("mlp.gate", c["n_routed_experts"], c["hidden_size"])
    if c["model_type"] == "deepseek_v3":
        yield "mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
    for e in range(c["n_routed_experts"]):
        yield from _swiglu(f"mlp.experts.{e}", c, F)
    if c["n_shared_experts"]:
        yield from _swiglu("mlp.shared_experts", c, F * c["n_shared_experts"])


def _gpt_oss_moe(c: Config, i: int) -> Iterator[Weight]:
    D, F, E = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    yield from _linear("mlp.router", E, D, bias=True)
    for name, out, into in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
        if "quantization_config" in c:  # 32 four-bit values to a 16-byte block with one scale
            yield f"mlp.experts.{name}_blocks", (E, out, into // 32, 16)
            yield f"mlp.experts.{name}_scales", (E, out, into // 32)
        else:
            yield f"mlp.experts.{name}", (E, into, out)
        yield f"mlp.experts.{name}_bias", (E, out)


def _decoder(
    attention: Callable[[Config], Iterable[Weight]],
    mlp: Callable[[Config, int], Iterable[Weight]],
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
) -> Callable[[Config], Iterator[Weight]]:
    """The frame that all families share: embedding, layers, final norm and, if untied, a head."""

    def weights(c: Config) -> Iterator[Weight]:
        V, D = c["vocab_size"], c["hidden_size"]
        yield "model.embed_tokens.weight", (V, D)
        for i in range(c["num_hidden_layers"]):
            parts = [*((f"{norm}.weight", (D,)) for norm in norms), *attention(c), *mlp(c, i)]
            yield from ((f"model.layers.{i}.{name}", shape) for name, shape in parts)
        yield "model.norm.weight", (D,)
        if not c["tie_word_embeddings"]:
            yield "lm_head.weight", (V, D)

    return weights


# ---- the families -------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One architecture: its tiny config (published spelling) and its weights.

    Attributes:
        adds_bos: the tokenizer begins every text with the bos token.
    """

    architecture: str
    config: Config
    weights: Callable[[Config], Iterator[Weight]]
    adds_bos: bool = True


_TINY: Config = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "use_cache": True,
}

_QWEN: Config = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}

_DEEPSEEK: Config = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "attention_bias": False,
}

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}


def _without(c: Config, *names: str) -> Config:
    return {k: v for k, v in c.items() if k not in names}


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {**_TINY, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        _decoder(_attention, _dense_mlp),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {**_TINY, "sliding_window": 32},
        _decoder(_attention, _dense_mlp),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**_without(_TINY, "head_dim"), **_QWEN},
        _decoder(partial(_attention, qkv_bias=True), _dense_mlp),
        adds_bos=False,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_TINY, **_QWEN, "attention_bias": False},
        _decoder(partial(_attention, qk_norm=True), _dense_mlp),
        adds_bos=False,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **_TINY,
            **_QWEN,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
        _decoder(partial(_attention, qk_norm=True), _qwen_moe),
        adds_bos=False,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            **_TINY,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
        _decoder(_attention, _mixtral_moe),
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        {
            **_without(_TINY, "head_dim"),
            **_DEEPSEEK,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "scoring_func": "softmax",
            "topk_method": "group_limited_greedy",
        },
        _decoder(_latent_attention, _deepseek_moe),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {
            **_without(_TINY, "head_dim"),
            **_DEEPSEEK,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        _decoder(_latent_attention, _deepseek_moe),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **_without(_TINY, "hidden_act"),
            "num_hidden_layers": 3,
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 16,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "sliding_window": 32,
            "sliding_window_pattern": 3,
            "tie_word_embeddings": True,
        },
        _decoder(
            partial(_attention, qk_norm=True),
            _dense_mlp,
            norms=(
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
        ),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            **_TINY,
            "attention_bias": True,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "experts_per_token": 2,
            "num_experts_per_tok": 2,
            "rope_scaling": _YARN,
            "rope_theta": 150000.0,
            "sliding_window": 32,
            "sliding_window_pattern": 2,
            "swiglu_limit": 7.0,
        },
        _decoder(_sink_attention, _gpt_oss_moe),
        adds_bos=False,
    ),
}

BENCH_SHAPES: dict[str, tuple[str, Config]] = {
    "qwen3-120m": (  # 119.6 M parameters
        "qwen3",
        {
            "vocab_size": 16384,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rope_theta": 1000000.0,
        },
    ),
    "qwen3-0.6b": (  # 596 M parameters: the published dimensions
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe-166m": (  # 165.8 M parameters, 32 experts, 4 of them active
        "qwen3_moe",
        {
            "vocab_size": 16384,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "moe_intermediate_size": 384,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek-v3-tiny": (  # 33 M parameters, 16 experts, 4 of them active
        "deepseek_v3",
        {
            "vocab_size": 16384,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "moe_intermediate_size": 192,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "kv_lora_rank": 128,
            "q_lora_rank": 192,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "max_position_embeddings": 4096,
        },
    ),
}
"""Benchmark models: a family and the overrides that give it its size."""


def family_config(model_type: str, dtype: str = "float32", **overrides: Any) -> Config:
    """The config.json of a family; an override of None in place of a dict is written as null.

    `rope_parameters` replaces the older `rope_theta` and `rope_scaling`.
    """
    family = FAMILIES[model_type]
    c = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "torch_dtype": dtype,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        **family.config,
        **overrides,
    }
    if "rope_parameters" in overrides:
        c = _without(c, "rope_theta", "rope_scaling", "rope_local_base_freq")
    if (every := c.get("sliding_window_pattern")) and "layer_types" not in c:
        kinds = ["sliding_attention"] * (every - 1) + ["full_attention"]
        c["layer_types"] = [kinds[i % every] for i in range(c["num_hidden_layers"])]
    return c


# ---- values -------------------------------------------------------------------------------

_MOMENTS: list[tuple[str, float, float]] = [  # the first pattern that matches: mean, deviation
    (r"[qk]_norm.*gemma", 0.5, 0.2),  # gemma scales by one plus the weight
    (r"post_feedforward_layernorm.*gemma", 8.0, 0.2),
    (r"norm\.weight.*gemma", 0.0, 0.2),
    (r"[qk]_norm\.weight", 1.5, 0.2),
    (r"norm\.weight", 1.0, 0.2),
    (r"sinks", 0.0, 1.0),
    (r"bias", 0.0, 0.1),
]

_GAINS: list[tuple[str, float]] = [  # everything else has deviation gain / sqrt(fan-in)
    (r"lm_head|embed_tokens", 2.5),
    (r"o_proj|down_proj|w2", 3.0),
    (r"[qk]_(b_)?proj|kv_b_proj", 2.0),
]
"""Layers add more than the embedding holds, even when it doubles as the head, and attention is
sharp: the next token depends on the context, and greedy text does not fall at once into repeating
one token."""


def _moments(c: Config, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    for pattern, mean, deviation in _MOMENTS:
        if re.search(pattern, f"{name} {c['model_type']}"):
            return mean, deviation
    fan_in = shape[-2] if len(shape) == 3 else shape[-1]  # gpt_oss stores [expert, in, out]
    gain = next((gain for pattern, gain in _GAINS if re.search(pattern, name)), 1.0)
    return 0.0, gain / fan_in**0.5


def _values(c: Config, name: str, shape: tuple[int, ...], seed: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("_blocks"):
        return rng.integers(0, 256, shape, np.uint8)
    if name.endswith("_scales"):  # exponents biased by 127; four-bit values are about 3 wide
        return rng.integers(121, 124, shape, np.uint8)
    mean, deviation = _moments(c, name, shape)
    x = rng.standard_normal(shape, np.float32)
    x *= deviation
    x += mean
    keep = name.endswith("e_score_correction_bias")  # published in float32 whatever the rest is
    return x if keep else x.astype(DTYPES[dtype])


# ---- the tokenizer ------------------------------------------------------------------------

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = """
The quick brown fox jumps over the lazy dog. A server answers many requests at once, and every
answer is the same as if it had been alone. Where does the time go? Reading the weights, mostly.
{"name": "value", "list": [1, 2, 3.14], "true": false, "none": null}
def add(a, b): return a + b  # one, two, three, four, five
Straße, naïve, 東京, Привет, 🙂 -- 0123456789 0.25 1e-6 (2 + 2 = 4)
"""


def _corpus(vocab_size: int, seed: int = 0) -> Iterator[str]:
    """The built-in text, then as many pseudo-words as a vocabulary of this size needs."""
    yield from [_TEXT] * 4
    if vocab_size <= 400:
        return
    rng = np.random.default_rng(seed)
    starts, ends = "bcdfghklmnprstvz", ("a", "e", "i", "on", "ur")
    syllables = [a + b + c for a in starts for b in "aeiou" for c in ("", *ends)]
    for _ in range(vocab_size // 16):
        words = rng.choice(syllables, (16, 4))
        yield " ".join("".join(word[: 2 + i % 3]) for i, word in enumerate(words))


def write_tokenizer(folder: Path, vocab_size: int, adds_bos: bool) -> None:
    """Trains a byte-level BPE of at most `vocab_size` tokens; the same arguments, the same file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(vocab_size), trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS if adds_bos else None,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": adds_bos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
            "chat_template": CHAT_TEMPLATE,
        },
    )


# ---- writing ------------------------------------------------------------------------------


def write_checkpoint(
    folder: str | Path,
    model_type: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint as Hugging Face stores it, and returns its folder.

    Args:
        model_type: a key of `FAMILIES`.
        dtype: of the stored weights: float32, float16 or bfloat16.
        shards: more than one writes an index beside as many safetensors files.
        tokenizer: write tokenizer.json with special tokens and a chat template too.
        overrides: config.json fields; shapes follow them. See `BENCH_SHAPES` and `MXFP4`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    c = family_config(model_type, dtype, **overrides)
    _write_json(folder / "config.json", c)
    eos = [SPECIAL_TOKENS.index(EOS), SPECIAL_TOKENS.index("<|im_end|>")]
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": c["bos_token_id"], "eos_token_id": eos, "pad_token_id": 2},
    )
    _write_weights(folder, c, list(FAMILIES[model_type].weights(c)), seed, dtype, shards)
    if tokenizer:
        write_tokenizer(folder, c["vocab_size"], FAMILIES[model_type].adds_bos)
    return folder


def _write_weights(
    folder: Path, c: Config, weights: list[Weight], seed: int, dtype: str, shards: int
) -> None:
    parts = [weights[i::shards] for i in range(shards)]
    index, total = {}, 0
    for i, part in enumerate(parts):
        number = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        name = f"model{number}.safetensors"
        arrays = {weight: _values(c, weight, shape, seed, dtype) for weight, shape in part}
        save_file(arrays, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
    if shards > 1:
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
