"""How much sooner searches end that run ahead: `python -m benchmarks.search_speed`.

The engine's c(b) comes first, since it says what can be had: rows are worth filling as far as a
step of twice the rows takes less than twice as long. Then each policy with and without speculation,
in turn. With `--shape`, a model of random weights and so many parameters takes the place of the
shipped one: all steps have 16 tokens, and rewards are its confidence.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import search_engine
from benchmarks.reason_eval import task_of
from benchmarks.records import machine
from jaxserve import LLM
from jaxserve.protocol import Gen, Question
from jaxserve.testing import write_checkpoint
from reasoning.questions import question_of
from reasoning.tasks import distinct

MODEL = Path("models/modchain-moe")
SHAPES: dict[str, dict[str, Any]] = {
    "deep-11m": {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 14,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 512,
    },
    "wide-42m": {
        "vocab_size": 512, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
        "max_position_embeddings": 512,
    },
}  # fmt: skip
"""Of the family qwen3."""


def shipped(llm: LLM, count: int, seed: int) -> list[Question]:
    task = task_of(MODEL)
    return [
        question_of(task, problem, llm.tokenizer, seed=seed + i, max_tokens=128)
        for i, problem in enumerate(distinct(task, "dev", seed, count))
    ]


def made_up(vocab: int, count: int, seed: int) -> list[Question]:
    """Prompts of random tokens whose paths end at 128."""
    rng = np.random.default_rng(seed)

    def read(tokens: Sequence[int]) -> int:
        return tokens[-1]

    prompts = rng.integers(8, vocab, (count, 16)).tolist()
    return [Question(tuple(p), read, (), 128, seed + i) for i, p in enumerate(prompts)]


def measure(llm: LLM, questions: list[Question], args: argparse.Namespace, about: dict[str, Any]):
    """Prints a line for the costs of steps, and one for every comparison."""

    def tell(name: str, **figures: Any) -> None:
        print(json.dumps({"name": name, **about, **figures, **machine()}), flush=True)

    def costs(name: str) -> dict[int, float]:
        found = search_engine.step_costs(llm, questions[0].prompt)
        tell(name, milliseconds={rows: round(1e3 * s, 3) for rows, s in found.items()})
        return found

    before = costs("c(b)")
    settings = {"gen": Gen(16)} if args.shape else {}
    for policy in args.policies:
        for together in args.queries:
            tell(
                "wall",
                **search_engine.wall_time(
                    llm, questions, policy, together, args.repeats, costs=before, **settings
                ),
            )
    costs("c(b) again")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--policies", nargs="+", default=["mcts", "rebase"])
    parser.add_argument("--queries", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.shape is None:
        with LLM(MODEL, progress=False) as llm:
            llm.wait_until_warm()
            about = {"model": str(MODEL), "plan": llm.plan.describe()}
            measure(llm, shipped(llm, 32, args.seed), args, about)
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES[args.shape]
        write_checkpoint(folder, "qwen3", dtype="float32", **shape)
        with LLM(folder, progress=False) as llm:
            llm.wait_until_warm()
            about = {"model": f"random {args.shape}", "plan": llm.plan.describe()}
            measure(llm, made_up(shape["vocab_size"], 32, args.seed), args, about)


if __name__ == "__main__":
    main()
