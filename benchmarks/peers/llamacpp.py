"""llama.cpp through its C interface, with a continuous batching of our own around it.

The binding's own class runs one sequence at a time, and llama.cpp's server is not part of it. The
checkpoint is converted once for each dtype, beside itself.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import llama_cpp as llama
import numpy as np

from benchmarks.peers.protocol import Loaded, Settings, serve

BATCH = 512  # tokens of one step
SLOTS = 16  # requests that run at once, each with room for the whole context; 32 are not quicker
WEIGHTS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0"}


@dataclass
class Row:
    """A request: its prompt and what came after, of which the first `done` ids are in the cache."""

    ids: list[int]
    end: int
    slot: int = -1
    done: int = 0


class Engine:
    """Steps of at most `BATCH` tokens: one of each row that decodes, the rest from prompts."""

    def __init__(self, settings: Settings):
        self._settings = settings
        file = str(_converted(Path(settings.model), settings.dtype)).encode()
        self._model = llama.llama_model_load_from_file(file, llama.llama_model_default_params())
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        self._open(unified=False)

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        self._prefix = _common(prompts) if len(prompts) > 1 else 0
        self._use(unified=self._prefix > 0)
        llama.llama_memory_clear(self._memory, False)
        rows = [Row(ids[:], len(ids) + n) for ids, n in zip(prompts, lengths, strict=True)]
        waiting, running = rows[::-1], []
        while waiting or running:
            self._step(self._schedule(waiting, running))
            for row in [row for row in running if len(row.ids) == row.end]:
                running.remove(row)
                llama.llama_memory_seq_rm(self._memory, row.slot, -1, -1)
        return [row.ids[-n:] for row, n in zip(rows, lengths, strict=True)]

    def _use(self, unified: bool) -> None:
        """One buffer for all rows, in which they can share, or one for each, which is quicker."""
        if unified != self._unified:
            llama.llama_free(self._context)
            self._open(unified)

    def _open(self, unified: bool) -> None:
        self._unified = unified
        params = _context_params(self._settings, unified)
        self._context = llama.llama_init_from_model(self._model, params)
        self._memory = llama.llama_get_memory(self._context)

    def _schedule(self, waiting: list[Row], running: list[Row]) -> list[tuple[Row, int]]:
        """Rows and how many of their ids run now, first come first served."""
        plan, room = [], BATCH
        for row in self._candidates(waiting, running):
            plan.append((row, min(room, len(row.ids) - row.done)))
            room -= plan[-1][1]
            if not room:
                break
        # Buffers of neighbours run together. Closing the gaps that finished rows leave gave 3 %.
        return sorted(plan, key=lambda item: item[0].slot)

    def _candidates(self, waiting: list[Row], running: list[Row]) -> Iterator[Row]:
        yield from list(running)
        while waiting and len(running) < SLOTS:
            row = waiting.pop()
            self._place(row, running)
            running.append(row)
            yield row

    def _place(self, row: Row, running: list[Row]) -> None:
        """Gives it the first free slot, and what the oldest row has of the common prefix."""
        row.slot = min(set(range(SLOTS)) - {other.slot for other in running})
        if self._prefix and running:
            row.done = min(self._prefix, running[0].done, len(row.ids) - 1)
            llama.llama_memory_seq_cp(self._memory, running[0].slot, row.slot, 0, row.done)

    def _step(self, plan: list[tuple[Row, int]]) -> None:
        self._batch.n_tokens = 0
        for row, count in plan:
            for i in range(row.done, row.done + count):
                self._add(row.ids[i], i, row.slot, wanted=i + 1 == len(row.ids))
            row.done += count
        if code := llama.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {code}")
        if ready := [row for row, _ in plan if row.done == len(row.ids)]:
            logits = llama.llama_get_logits(self._context)
            best = np.ctypeslib.as_array(logits, (len(ready), self._vocab_size)).argmax(-1)
            for row, token in zip(ready, best.tolist(), strict=True):
                row.ids.append(token)

    def _add(self, token: int, position: int, slot: int, wanted: bool) -> None:
        batch, i = self._batch, self._batch.n_tokens
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, slot
        batch.n_tokens += 1


def load(settings: Settings) -> Loaded:
    return Loaded(Engine(settings).generate)


def _common(prompts: list[list[int]]) -> int:
    """How many ids all of them begin with."""
    columns = zip(*prompts, strict=False)
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))


def _context_params(settings: Settings, unified: bool) -> llama.llama_context_params:
    """Flash attention was the quicker one, but rounds keys and values to float16."""
    exact = settings.dtype == "float32"
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_seq_max = SLOTS * settings.max_len, SLOTS
    params.n_outputs_max = SLOTS
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = settings.threads
    params.kv_unified = unified
    params.flash_attn_type = int(not exact)  # disabled or enabled; -1 would leave it to llama.cpp
    params.type_k = params.type_v = llama.GGML_TYPE_F32 if exact else llama.GGML_TYPE_F16
    return params


def _converted(model: Path, dtype: str) -> Path:
    """Made in a process of its own, whose memory does not count, and named only when whole."""
    file = model.with_name(f"{model.name}-{dtype}.gguf")
    if not file.exists():
        part = file.with_suffix(".part")
        convert = [sys.executable, "-m", "benchmarks.peers.to_gguf"]
        subprocess.run([*convert, str(model), WEIGHTS[dtype], str(part)], check=True)
        part.rename(file)
    return file


if __name__ == "__main__":
    serve(load, ["llama-cpp-python"])
