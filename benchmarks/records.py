"""What a measurement is written down with: numbers, machine, versions and commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import resource
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def peak_rss_mib() -> float:
    """Most memory this process ever held resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> dict[str, Any]:
    """Device and commit, and how busy the machine was: a load above the threads used is noise."""
    return {
        "device": f"{_cpu_model()}, {os.cpu_count()} cores",
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """A short name for files: the microarchitecture where it is known."""
    found = _cpu_fields()
    known = {("AuthenticAMD", "26"): "zen5", ("AuthenticAMD", "25"): "zen4"}
    model = found.get("model name") or platform.processor() or platform.machine()
    name = known.get((found.get("vendor_id", ""), found.get("cpu family", "")), model)
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def record(name: str, workload: str, samples: Sequence[float], unit: str, **more: Any) -> dict:
    """One measurement: the median and every sample behind it."""
    return {
        "name": name,
        "workload": workload,
        "median": round(statistics.median(samples), 4),
        "samples": [round(sample, 4) for sample in samples],
        "unit": unit,
        **more,
        **machine(),
    }


def write(line: dict, path: Path | None = None) -> None:
    """Prints a record as one JSON line, or appends it to a file."""
    if path is None:
        print(json.dumps(line), flush=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")


def _cpu_model() -> str:
    """Name, family and model: names such as "AMD EPYC" span generations."""
    found = _cpu_fields()
    name = found.get("model name", platform.processor())
    return f"{name} (family {found.get('cpu family')}, model {found.get('model')})"


def _cpu_fields() -> dict[str, str]:
    found = dict[str, str]()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # a machine that was lent for an hour need not have git
        return "unknown"
    return found.stdout.strip() or "unknown"
