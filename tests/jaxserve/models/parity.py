"""Runs a checkpoint through our forward pass, packed and paged, as tests compare it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.cache.attend import paged
from jaxserve.cache.kv_cache import allocate
from jaxserve.checkpoint import hf
from jaxserve.models.attention import packed
from jaxserve.models.family import Family, family
from jaxserve.models.ops import Ops
from kernels_pallas.paged_attention import Ragged

PAGE = 8

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Most of a test's time goes into compiling what then runs once."""


def load(folder: Path, dtype: Any = np.float32) -> tuple[Family, Any, Any]:
    """Family, config and weights of a folder."""
    config = hf.read_config(folder)
    f = family(config["model_type"])
    cfg = hf.model_config(f, config)
    return f, cfg, hf.load_params(folder, f, cfg, dtype, progress=False)


def packed_logits(
    f: Family, cfg: Any, params: Any, tokens: Any, segments: Any, positions: Any
) -> jax.Array:
    """[B, T, V] for packed documents [B, T]."""
    ops = Ops(attend=packed(segments, positions), dtype=jnp.float32)
    x, _ = f.forward(cfg, params, tokens, positions, ops, None)
    return f.logits(cfg, params, x, ops)


def run_packed(f: Family, cfg: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] for whole sequences [B, T]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    run = jit(lambda p, *inputs: packed_logits(f, cfg, p, *inputs))
    return np.asarray(run(params, jnp.asarray(tokens), jnp.zeros_like(positions), positions))


def run_paged(
    f: Family, cfg: Any, params: Any, sequences: Sequence[np.ndarray], seed: int = 0, T: int = 48
) -> list[np.ndarray]:
    """[len, V] for each sequence, served together in ragged chunks of random sizes."""
    R, rng = len(sequences) + 1, np.random.default_rng(seed)
    per_sequence = -(-max(map(len, sequences)) // PAGE)
    pages = rng.permutation(R * per_sequence + 3).astype(np.int32)
    tables = pages[: R * per_sequence].reshape(R, per_sequence)
    kv = allocate(cfg.num_layers, len(pages), PAGE, cfg.kv_shape, jnp.float32, jax.devices()[0])

    def step(params, kv, tokens, positions, batch):
        ops = Ops(attend=paged(batch), dtype=jnp.float32)
        x, kv = f.forward(cfg, params, tokens, positions, ops, kv)
        return f.logits(cfg, params, x, ops)[0], kv

    compiled = jit(step, donate_argnums=1)
    done, out = np.zeros(R - 1, int), [[] for _ in sequences]
    while any(n < len(s) for n, s in zip(done, sequences, strict=True)):
        left = np.array([len(s) for s in sequences]) - done
        chunk = np.minimum(left, rng.choice([0, 1, 1, 7, T // R], R - 1))
        starts = np.concatenate([[0], np.cumsum(chunk)])
        tokens, positions = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
        for r, s in enumerate(sequences):
            tokens[0, starts[r] : starts[r + 1]] = s[done[r] : done[r] + chunk[r]]
            positions[0, starts[r] : starts[r + 1]] = np.arange(done[r], done[r] + chunk[r])
        batch = Ragged(
            np.append(starts, starts[-1]).astype(np.int32),
            np.append(done + chunk, 0).astype(np.int32),
            tables,
            np.int32(R - 1),
        )
        rows, kv = compiled(params, kv, tokens, positions, batch)
        for r in range(R - 1):
            out[r].append(np.asarray(rows)[starts[r] : starts[r + 1]])
        done += chunk
    return [np.concatenate(rows) for rows in out]
