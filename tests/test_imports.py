"""The shape of the code: who may import whom, what files are called, how long they get."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxserve", "sharding", "kernels_pallas", "moe", "reasoning")

MAY_IMPORT = {
    "sharding": "jax numpy",
    "kernels_pallas": "jax jaxlib numpy ml_dtypes",
    "moe": "sharding kernels_pallas jax numpy",
    "reasoning": "jaxserve.protocol",
    "reasoning.result": "jaxserve.protocol reasoning.drawing rich",
    "jaxserve": "jaxserve.llm jaxserve.request",
    "jaxserve.errors": "",
    "jaxserve.request": "jaxserve.errors",
    "jaxserve.protocol": "jaxserve.request",
    "jaxserve.config": "jaxserve.errors",
    "jaxserve.testing": "safetensors tokenizers numpy ml_dtypes",
    "jaxserve.models": """jaxserve.errors jaxserve.checkpoint.mxfp4
        moe kernels_pallas sharding jax numpy""",
    "jaxserve.checkpoint": """jaxserve.errors jaxserve.models.family jaxserve.models.reward_head
        kernels_pallas sharding jax numpy ml_dtypes rich huggingface_hub safetensors""",
    "jaxserve.checkpoint.mxfp4": "jaxserve.errors numpy ml_dtypes",
    "jaxserve.quant": """jaxserve.models jaxserve.checkpoint jaxserve.errors
        kernels_pallas moe sharding jax numpy rich""",
    "jaxserve.cache": "jaxserve.errors jaxserve.models.ops kernels_pallas sharding jax numpy",
    "jaxserve.split": """jaxserve.config jaxserve.errors jaxserve.models.parallel
        moe kernels_pallas sharding""",
    "jaxserve.plan": """jaxserve.split jaxserve.config jaxserve.errors jaxserve.cache
        jaxserve.checkpoint.schemes moe kernels_pallas sharding jax""",
    "jaxserve.deployment": """jaxserve.models jaxserve.checkpoint jaxserve.errors
        sharding jax""",
    "jaxserve.deployment.compiled": """jaxserve.engine jaxserve.split jaxserve.plan jaxserve.config
        jaxserve.quant jaxserve.models jaxserve.errors jaxserve.deployment.shapes
        moe kernels_pallas sharding jax numpy""",
    "jaxserve.text": "jaxserve.errors jaxserve.request tokenizers jinja2 llguidance numpy",
    "jaxserve.engine": """jaxserve.plan jaxserve.config jaxserve.cache jaxserve.models
        jaxserve.request jaxserve.errors moe kernels_pallas sharding jax numpy""",
    "jaxserve.paths": """jaxserve.engine jaxserve.protocol jaxserve.request jaxserve.errors""",
    "jaxserve.intake": """jaxserve.engine jaxserve.plan jaxserve.cache jaxserve.text
        jaxserve.request jaxserve.errors""",
    "jaxserve.weights": """jaxserve.plan jaxserve.config jaxserve.models jaxserve.checkpoint
        jaxserve.quant jaxserve.errors kernels_pallas sharding jax numpy""",
    "jaxserve.searches": """jaxserve.paths jaxserve.intake jaxserve.engine.loop jaxserve.protocol
        jaxserve.request jaxserve.errors reasoning msgspec""",
    "jaxserve.llm": """jaxserve.searches jaxserve.paths reasoning.result
        jaxserve.split jaxserve.intake jaxserve.weights jaxserve.engine jaxserve.plan
        jaxserve.config jaxserve.cache jaxserve.models jaxserve.checkpoint jaxserve.quant
        jaxserve.text jaxserve.request jaxserve.errors kernels_pallas sharding jax numpy""",
    "jaxserve.train": """jaxserve.checkpoint jaxserve.models jaxserve.errors
        moe kernels_pallas sharding jax numpy optax orbax rich""",
    "jaxserve.server": """jaxserve.text jaxserve.request jaxserve.errors jaxserve.__version__
        jaxserve.engine.generation starlette uvicorn msgspec prometheus_client""",
    "jaxserve.server.search": """jaxserve.server jaxserve.searches jaxserve.protocol
        jaxserve.request jaxserve.errors reasoning.result reasoning.speculation
        msgspec starlette""",
}
"""What each package or module may import besides the standard library and itself.

A row also covers the modules below it, unless they have a row of their own; `jaxserve` is the
package's own file alone. `jaxserve.cli` puts the parts together: it has no row, may import
everything, and nobody imports it.
"""

VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}
LONG_FILES = {"jaxserve/testing.py"}  # a table of the families, and of little else


@cache
def modules() -> dict[str, Path]:
    """Every module of the five packages, by its dotted name."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    names = (file.relative_to(ROOT).with_suffix("").parts for file in files)
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): file
        for parts, file in zip(names, files, strict=True)
    }


def imports(module: str) -> Iterator[tuple[str, int]]:
    """What a module imports, as dotted names with line numbers, wherever the statement stands."""
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: imports are absolute here"
            assert node.module
            for alias in node.names:  # `from a import b` may name the module a.b
                whole = f"{node.module}.{alias.name}"
                named = whole in modules() or node.module in PACKAGES
                yield whole if named else node.module, node.lineno


def covers(row: str, module: str) -> bool:
    return module == row or module.startswith(f"{row}.")


def row_of(module: str) -> str | None:
    """The closest row of the table; the bare `jaxserve` covers nothing below it."""
    if module == "jaxserve":
        return module
    rows = [row for row in MAY_IMPORT if row != "jaxserve" and covers(row, module)]
    return max(rows, key=len, default=None)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str):
    if covers("jaxserve.cli", module):
        return
    row = row_of(module)
    assert row, f"{module} has no row in MAY_IMPORT; say there what it builds on"
    allowed = [row, *MAY_IMPORT[row].split()]
    wrong = {
        f"line {line}: {name}"
        for name, line in imports(module)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(covers(prefix, name) for prefix in allowed if prefix != "jaxserve")
    }
    assert not wrong, f"{module} may import {MAY_IMPORT[row] or 'nothing'}, but has {sorted(wrong)}"


def test_every_row_is_about_something():
    waiting = set()
    gone = [row for row in MAY_IMPORT if row not in modules() and row not in waiting]
    assert not gone, f"MAY_IMPORT has rows for modules that are not there: {gone}"


def test_requests_and_controllers_need_no_jax():
    """A search controller, and a client that only builds requests, start at once."""
    code = (
        "import sys, jaxserve, reasoning; from jaxserve import SamplingParams; "
        "print(*({'jax', 'numpy'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not loaded


def test_every_file_is_named_after_something():
    vague = [name for name in modules() if VAGUE & set(name.split("."))]
    assert not vague, f"{vague}: a function without a home is a missing noun"


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Its lines, without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


@pytest.mark.parametrize("module", sorted(modules()))
def test_functions_fit_on_a_screen(module: str):
    if covers("kernels_pallas", module):
        return  # a kernel is one schedule, and reads best in one piece
    functions = [
        node
        for node in ast.walk(ast.parse(modules()[module].read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [f"{f.name} has {length(f)} lines" for f in functions if length(f) > 60]
    assert not long


def too_long(file: Path) -> bool:
    return len(file.read_text().splitlines()) > 500


def test_files_hold_one_noun():
    long = {str(file.relative_to(ROOT)) for file in modules().values() if too_long(file)}
    assert not long - LONG_FILES, "past 500 lines a file is asked which noun it hides"
    assert not LONG_FILES - long, "no longer long: take it off the list"


@pytest.mark.filterwarnings("default::UserWarning")
def test_long_tests_are_noticed():
    for file in (ROOT / "tests").rglob("*.py"):
        if too_long(file):
            warnings.warn(f"{file.relative_to(ROOT)} is past 500 lines", stacklevel=1)
