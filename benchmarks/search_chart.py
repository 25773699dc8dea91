"""Charts of searches: `python -m benchmarks.search_chart benchmarks/results/search-*.jsonl`.

Draws accuracy against tokens for every method that `benchmarks.search` wrote a line for, one panel
for each model, into docs/search.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "docs" / "search.svg"


def curves(files: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Lines of accuracy by model, in the order in which they were written."""
    found = dict[str, list[dict[str, Any]]]()
    for file in files:
        for line in map(json.loads, file.read_text().splitlines()):
            if line.get("part") == "accuracy":
                found.setdefault(line.get("model", "modchain-moe"), []).append(line)
    return found


def chart(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy over log tokens."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "search"  # the same figures make the same file
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(found), figsize=(2 + 5 * len(found), 4.5), layout="constrained", squeeze=False
    )
    names = dict.fromkeys(line["name"] for lines in found.values() for line in lines)
    color = {name: f"C{i}" for i, name in enumerate(names)}
    for axes, (model, lines) in zip(panels[0], found.items(), strict=True):
        for line in lines:
            ours, ceiling = line["name"].startswith("hyper"), line["name"] == "pass@k"
            axes.plot(line["tokens"], line["accuracy"], label=line["name"],
                      color=color[line["name"]],
                      marker="." if not ceiling else "", linewidth=2.5 if ours else 1.2,
                      linestyle=":" if ceiling else "-")  # fmt: skip
        axes.set_xscale("log")
        axes.set_title(model)
        axes.set_xlabel("tokens for a problem")
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    chart(curves(args.results), args.out)


if __name__ == "__main__":
    main()
