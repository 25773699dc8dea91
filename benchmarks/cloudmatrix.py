"""CloudMatrix384 as published beside what the cost model says: docs/cloudmatrix.md and its chart.

    python -m benchmarks.cloudmatrix            # writes both
    python -m benchmarks.cloudmatrix --check    # says whether the tables are those of the code

Compiled programs' figures are those that `benchmarks.parallel --only compiled` has written last.

Rows are the oracle of the specification (§11) and the tables of DeepSeek-R1 on CloudMatrix-Infer
(§10). Every prediction is of the deployment that the paper describes: decoding on 320 dies with
DP320 and EP320, prompts on 32 dies with EP32 and SP-TP-SP. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxserve.deployment import cost, operators, prediction, shapes
from jaxserve.deployment.operators import Model, Operator, Work
from jaxserve.deployment.prediction import Decode, Prefill, Traffic
from sharding.hardware import named
from sharding.mesh import Parallelism

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parent / "results" / "parallel-zen4.jsonl"

DECODE, PREFILL = named("cm384-decode"), named("cm384-prefill")
DECODE_SPLIT = Parallelism(data=320, expert=320)
PREFILL_SPLIT = Parallelism(expert=32, tensor=32, sequence=32)
DIES = 2  # of an NPU, by which the paper counts

DECODE_ROWS = (  # SLO ms, prompt, output, batch, TPOT ms, tokens/s
    (50, 1024, 1024, 128, 46.8, 2733),
    (50, 2048, 256, 112, 47.4, 2360),
    (50, 4096, 256, 96, 49.4, 1943),
    (30, 4096, 256, 24, 24.6, 974),
    (15, 4096, 256, 8, 14.9, 538),
)


@dataclass(frozen=True)
class Row:
    """A published figure and the model's.

    Attributes:
        section: of the specification.
        compiled: the same of a compiled program, where there is such.
    """

    name: str
    section: str
    unit: str
    published: float
    model: float
    compiled: str = "–"

    @property
    def off(self) -> float:
        """Of the published figure."""
        return self.model / self.published - 1


def rows() -> list[Row]:
    """Every row of the document."""
    return [*throughputs(), *oracle()]


def throughputs() -> Iterator[Row]:
    """The tables of §10."""
    for slo, prompt, output, batch, tpot, rate in DECODE_ROWS:
        found = decode(Traffic(prompt, output), batch)
        name = f"decode {slo} ms, {prompt} / {output}, batch {batch}"
        yield Row(name, "10", "tokens/s/NPU", rate, DIES * found.rate)
        yield Row(f"{name}: TPOT", "10", "ms", tpot, 1e3 * found.tpot)
    for balanced, rate in ((False, 5655), (True, 6688)):
        name = f"prefill, {'perfect' if balanced else 'default'} EPLB"
        yield Row(name, "10", "tokens/s/NPU", rate, DIES * prefill(balanced).rate)


def decode(traffic: Traffic, batch: int) -> Decode:
    """The paper's decode instance with `batch` sequences per NPU."""
    return prediction.decode(_deepseek(), DECODE, DECODE_SPLIT, traffic, batch / DIES)


def prefill(balanced: bool) -> Prefill:
    """The paper's prefill instance."""
    return prediction.prefill(_deepseek(), PREFILL, PREFILL_SPLIT, Traffic(balanced=balanced))


def oracle() -> Iterator[Row]:
    """The checks of §11."""
    yield from _identities()
    yield from _iteration()
    yield from _operators()
    yield from _memory()
    step = prefill(balanced=True)
    yield Row("prefill layer", "11", "ms", 40, 1e3 * step.layers.seconds / 61)
    yield Row("TTFT without reuse", "11", "ms", 2540, 1e3 * step.ttft)
    used = DIES * step.rate * 2 * _deepseek().active_params / (DIES * 752e12)
    yield Row("prefill GEMM utilisation", "11", "%", 32, 100 * used)


def _identities() -> Iterator[Row]:
    """What follows from how throughput is counted, at the paper's own TPOT."""
    for _, prompt, output, batch, tpot, rate in DECODE_ROWS:
        found = decode(Traffic(prompt, output), batch)
        at_published = replace(found, seconds=found.tokens * tpot / 1e3)
        name = f"batch {batch} / {tpot} ms"
        yield Row(name, "11", "tokens/s/NPU", rate, DIES * at_published.rate)
    int8 = DECODE.chip.int8
    assert int8 is not None
    for rate, efficiency in ((6688, 4.45), (5655, 3.76), (1943, 1.29)):
        yield Row(f"{rate} / {efficiency}", "11", "TOPS/NPU", rate / efficiency, DIES * int8)


def _iteration() -> Iterator[Row]:
    traffic = Traffic()
    step, plain = decode(traffic, 96), decode(replace(traffic, draft=False), 96)
    layer, without = (1e6 * d.layers.seconds / 61 for d in (step, plain))
    yield Row("iteration at batch 96", "11", "ms", 84.0, 1e3 * step.seconds)
    yield Row("61 layers of it", "11", "ms", 76.9, 61 * layer / 1e3)
    yield Row("the rest of it", "11", "ms", 7.1, 1e3 * (step.seconds - step.layers.seconds))
    yield Row("a layer without drafts", "6", "µs", 874, without)
    yield Row("MTP's gain at batch 96", "11", "×", 1.7 / (1260 / 874), 1.7 / (layer / without))
    alone = decode(replace(traffic, microbatch=False), 96)
    yield Row("microbatches' gain at batch 96", "5", "×", 1.094, alone.seconds / step.seconds)


def _operators() -> Iterator[Row]:
    """One microbatch of 24 requests, 16 of 24 cores for attention; 4,096 keys."""
    micro, place = Work(24, 2, 4096, decode=True), 16 / 24
    dense, moe = operators.step(_model(), micro)
    by_name = {op.name: op for op in (*dense.operators, *moe.operators)}
    attention = cost.operator_time(by_name["attention"], DECODE, place)
    yield Row("attention of 48 tokens, 16 cores", "11", "µs", 334, 1e6 * attention.seconds)
    yield Row("its memory floor", "11", "µs", 84, 1e6 * attention.memory)
    read = sum(cost.operator_time(by_name[n], DECODE).memory for n in ("prolog", "output"))
    yield Row("MLA weights read", "11", "µs", 139, 1e6 * read)
    for tokens, published in ((427, 187), (480, 211)):
        one = by_name["experts"]
        mlp = Operator("experts", "experts", one.flops * tokens / 480, one.weights, eight_bit=True)
        seconds = cost.operator_time(mlp, DECODE, 1 - place).seconds
        yield Row(f"expert MLP of {tokens} tokens, 8 cores", "11", "µs", published, 1e6 * seconds)


def _memory() -> Iterator[Row]:
    held = decode(Traffic(4095, 1), 96).memory
    for name, published, size in (
        ("experts of a decode die", 2.55, held.experts),
        ("MLA and dense layers", 12.6, held.layers),
        ("embedding and head", 3.7, held.embeddings),
        ("cache of 48 x 4,096 tokens", 13.8, held.cache),
    ):
        yield Row(name, "11", "GB", published, size / 1e9)


def _deepseek() -> shapes.Shape:
    return shapes.read("deepseek-r1")


def _model() -> Model:
    return Model(_deepseek(), DECODE_SPLIT, eight_bit=True)


# ---- the document -----------------------------------------------------------------------------


def table(found: list[Row], compiled: Mapping[str, str] | None = None) -> str:
    """Markdown; `compiled` has figures of compiled programs by the names of rows."""
    lines = [
        "| figure | § | unit | paper | model | off | compiled program |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        third = (compiled or {}).get(row.name, row.compiled)
        figures = f"{_figure(row.published)} | {_figure(row.model)} | {row.off:+.1%}"
        lines.append(f"| {row.name} | {row.section} | {row.unit} | {figures} | {third} |")
    return "\n".join(lines)


def _figure(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def programs(path: Path = RESULTS) -> list[dict[str, Any]]:
    """What was said last of every compiled program: a model, its slice and its microbatches."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        if line["part"] == "compiled":
            found[line["model"], line["target"], -line["microbatches"]] = line
    return [found[key] for key in sorted(found)]


def figures(found: list[dict[str, Any]]) -> dict[str, str]:
    """Figures of compiled programs, by the names of rows."""
    for p in found:
        if p["model"] == "deepseek-r1" and p["target"] == "v5p:4x4x20":
            token = p["kv_bytes"] / (p["sequences_per_device"] * p["context"])
            return {"cache of 48 x 4,096 tokens": _figure(48 * 4096 * token / 1e9)}
    return {}


def programs_table(found: list[dict[str, Any]]) -> str:
    """Markdown; bytes are of a dispatch or combine of one microbatch, and how often it is done."""
    lines = [
        "| model | slice | sequences, context | microbatches | memory | rows to experts "
        "| answers | by formula | computed under a collective |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in found:
        held, room = (p[key] / 1e9 for key in ("bytes_per_device", "bytes_available"))
        rows, answers = (_journey(p, c) for c in p["predicted_collectives"])
        equal = "the same" if all(c in _sent(p) for c in p["predicted_collectives"]) else "other"
        lines.append(
            f"| {p['model']} | {p['target']}, EP{p['parallelism']['expert']} "
            f"| {p['sequences_per_device']} x {p['context']:,} | {p['microbatches']} "
            f"| {held:.1f} of {room:.1f} GB | {rows} | {answers} | {equal} "
            f"| **{100 * p['overlapped_flops_share']:.0f} %** |"
        )
    return "\n".join(lines)


def _sent(p: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in c.items() if k != "group_size"} for c in p["collectives"]]


def _journey(p: dict[str, Any], predicted: dict[str, Any]) -> str:
    """What the program sends of a kind and element type."""
    kind, dtype = predicted["kind"], predicted["dtype"]
    sizes = [c for c in _sent(p) if (c["kind"], c["dtype"]) == (kind, dtype)]
    return ", ".join(f"{c['count']} x {c['num_bytes']:,} B `{dtype}`" for c in sizes) or "–"


def document(text: str, found: list[Row], compiled: list[dict[str, Any]]) -> str:
    """The document with its tables made anew; all else stays."""
    tables = {"table": table(found, figures(compiled)), "programs": programs_table(compiled)}
    for name, new in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        between = f"{begin}\n{new}\n{end}"
        text = re.sub(f"{begin}.*{end}", lambda _, new=between: new, text, flags=re.DOTALL)
    return text


def chart(found: list[Row], path: Path) -> None:
    """Predicted against published throughput."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cloudmatrix"  # the same figures make the same file
    from matplotlib import pyplot

    rates = [row for row in found if row.section == "10" and row.unit == "tokens/s/NPU"]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    places = range(len(rates))
    axes.barh([p - 0.2 for p in places], [r.published for r in rates], 0.4, label="published")
    bars = axes.barh([p + 0.2 for p in places], [r.model for r in rates], 0.4, label="cost model")
    axes.bar_label(bars, [f"{r.off:+.1%}" for r in rates], padding=3)
    axes.set_yticks(list(places), [row.name for row in rates])
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s of one NPU (two dies)")
    axes.set_title("DeepSeek-R1 on CloudMatrix384")
    axes.legend()
    axes.margins(x=0.1)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write() -> None:
    """Writes tables and chart into docs/."""
    found, path = rows(), DOCS / "cloudmatrix.md"
    path.write_text(document(path.read_text(), found, programs()))
    chart(found, DOCS / "cloudmatrix.svg")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would differ")
    if not parser.parse_args().check:
        write()
        return 0
    text = (DOCS / "cloudmatrix.md").read_text()
    return int(document(text, rows(), programs()) != text)


if __name__ == "__main__":
    sys.exit(main())
