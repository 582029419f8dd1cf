"""The figures as a table and as JSON, with what they were measured on."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson
from rich.table import Table

from benchmarks.context import Benchmark
from benchmarks.figures import RATIO, Figure
from benchmarks.loop import loop_name
from benchmarks.server import Server

__all__ = ["machine_facts", "table", "write_json"]

_PACKAGES = ("pgchannels", "asyncpg", "sqlalchemy", "fastapi", "starlette", "uvicorn", "websockets")
_FLUSHES = 200


async def machine_facts(server: Server) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "flush_ms": _flush_time(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "event_loop": loop_name(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        **await server.facts(),
    }


def _flush_time() -> float:
    """Milliseconds that a page takes to the disk of temporary files, where the server is."""
    with tempfile.TemporaryFile(buffering=0) as file:
        page = b"\0" * 8192
        file.write(page)
        start = time.perf_counter()
        for _ in range(_FLUSHES):
            file.seek(0)
            file.write(page)
            os.fsync(file.fileno())
        return round(1000 * (time.perf_counter() - start) / _FLUSHES, 3)


def table(benchmark: Benchmark, figures: Sequence[Figure]) -> Table:
    """One benchmark as people read it."""
    made = Table(title=f"{benchmark.name}: {benchmark.title}", title_justify="left")
    made.add_column("")
    for column in ("median", "min", "max"):
        made.add_column(column, justify="right")
    made.add_column("unit")
    made.add_column("expected", justify="right")
    for figure in figures:
        style = "bold" if figure.unit == RATIO else None
        values = (_format(figure, value) for value in (figure.median, figure.min, figure.max))
        made.add_row(figure.name, *values, figure.unit, _expected(figure), style=style)
    return made


def write_json(
    path: Path,
    facts: Mapping[str, Any],
    runs: int,
    results: Sequence[tuple[Benchmark, Sequence[Figure]]],
) -> None:
    """Write everything, each run's value too."""
    document = {
        "facts": facts,
        "runs": runs,
        "benchmarks": [
            {
                "name": benchmark.name,
                "title": benchmark.title,
                "figures": [_as_json(figure) for figure in figures],
            }
            for benchmark, figures in results
        ],
    }
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _as_json(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "unit": figure.unit,
        "median": figure.median,
        "min": figure.min,
        "max": figure.max,
        "values": figure.values,
        "at_least": figure.at_least,
        "at_most": figure.at_most,
        "as_expected": figure.as_expected,
    }


def _format(figure: Figure, value: float) -> str:
    return f"{value:,.0f}" if figure.median >= 1000 else f"{value:.2f}"


def _expected(figure: Figure) -> str:
    mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}[figure.as_expected]
    if figure.at_least is not None:
        return f"≥ {figure.at_least:,g} {mark}"
    if figure.at_most is not None:
        return f"≤ {figure.at_most:,g} {mark}"
    return ""
