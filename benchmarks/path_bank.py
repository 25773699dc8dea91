"""Recorded paths of a shipped model, for `benchmarks.replay`: searches without an engine.

    python -m benchmarks.path_bank models/modchain-moe --problems 400 --paths 128

writes `runs/paths/<model>-<split>.npz`. A controller that runs on a bank sees what the engine would
show it, token by token, thousands of times faster, which is what tuning needs. What it cannot see:
text that nobody recorded, so that branches go on as other recorded paths did from the same state.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reason_eval import task_of
from reasoning.tasks import Problem, Split, Task, distinct

TOP = 8  # tokens whose log-probabilities a confidence is the mean of
FOLDER = Path("runs/paths")


@dataclass(frozen=True, eq=False)
class Bank:
    """Paths [Q, N, T], padded with -1 and with zeros.

    Attributes:
        entropies: in nats; what the likeliest eight leave is taken to be spread evenly.
        right: answers of the questions.
        words: of the vocabulary, by token id; empty where it is no word of the task.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    margins: np.ndarray
    confidences: np.ndarray
    right: np.ndarray
    prompts: np.ndarray
    words: np.ndarray

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, file: Path) -> Bank:
        with np.load(file) as arrays:
            return cls(**arrays)


def record(
    folder: Path, split: Split, num_problems: int, num_paths: int, *, seed: int = 0, chunk: int = 20
) -> Bank:
    """Samples at temperature 1, of the first problems of a split."""
    from jaxserve import LLM, SamplingParams

    task = task_of(folder)
    problems = distinct(task, split, seed, num_problems)
    with LLM(folder, progress=False) as llm:
        length = llm.max_model_len // 2
        params = SamplingParams(n=num_paths, max_tokens=length, logprobs=TOP, seed=seed)
        parts = list[list[Any]]()
        for i in range(
            0, num_problems, chunk
        ):  # log-probabilities are large while they are objects
            outs = llm.generate([p.prompt for p in problems[i : i + chunk]], params)
            size = llm.tokenizer.vocab_size
            parts += [[_signals(o, size) for o in out.outputs] for out in outs]
            print(f"{i + len(outs)} of {num_problems} problems", flush=True)
        words = [llm.tokenizer.decode([i]).strip() for i in range(size)]
    return _bank(task, problems, parts, words)


def _bank(
    task: Task, problems: Sequence[Problem], parts: Sequence[Any], words: Sequence[str]
) -> Bank:
    most = max(len(path[0]) for paths in parts for path in paths)
    arrays = list[np.ndarray]()
    for kind in range(5):
        fill, dtype = (-1, np.int16) if kind == 0 else (0.0, np.float32)
        rows = np.full((len(parts), len(parts[0]), most), fill, dtype)
        for q, paths in enumerate(parts):
            for n, path in enumerate(paths):
                rows[q, n, : len(path[kind])] = path[kind]
        arrays.append(rows)
    right = np.array([task.answer(p) for p in problems])
    return Bank(*arrays, right, np.array([p.prompt for p in problems]), np.array(words))


def _signals(output: Any, vocabulary: int) -> tuple[Any, ...]:
    """Tokens, log-probabilities, entropies, margins and confidences of a completion."""
    rows = list[tuple[float, ...]]()
    for token, seen in zip(output.token_ids, output.logprobs, strict=True):
        top = sorted((x.logprob for x in seen.values()), reverse=True)[:TOP]
        rest = max(1.0 - sum(map(math.exp, top)), 1e-9)
        entropy = -sum(math.exp(x) * x for x in top)
        entropy -= rest * math.log(rest / (vocabulary - TOP))
        rows.append((seen[token].logprob, entropy, top[0] - top[1], -sum(top) / TOP))
    return output.token_ids, *zip(*rows, strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", choices=("train", "dev"), default="dev")
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--paths", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bank = record(args.model, args.split, args.problems, args.paths, seed=args.seed)
    bank.save(FOLDER / f"{args.model.name}-{args.split}.npz")


if __name__ == "__main__":
    main()
