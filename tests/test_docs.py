"""The Python in the documents runs.

Blocks of one document share their names, from top to bottom. A block fenced as `python no-run` is
only compiled; a path after that names the file that it is taken from, word for word.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")]
FENCE = re.compile(r"^```python(?P<marks>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Each block's code, the line it starts on, and what its fence says."""
    text = document.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield match["code"], line, match["marks"].split()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not document.exists():
        pytest.skip(f"{document.name} is not written yet")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")  # documents are read in a clone
    names: dict[str, object] = {"__name__": document.stem}
    for code, line, marks in blocks(document):
        padded = "\n" * (line - 1) + code  # a failure points into the document
        program = compile(padded, str(document), "exec", dont_inherit=True)
        if "no-run" not in marks:
            exec(program, names)
        elif marks[1:]:
            assert code in (ROOT / marks[1]).read_text(), f"line {line} differs from {marks[1]}"
    names.clear()
    gc.collect()  # engines end before the next document starts its own


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    if not document.exists():
        pytest.skip(f"{document.name} is not written yet")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
