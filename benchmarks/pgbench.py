"""Runs ``pgbench`` with a script of ours."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from asyncio.subprocess import PIPE, STDOUT
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PgbenchResult", "pgbench"]


@dataclass(frozen=True)
class PgbenchResult:
    transactions: int
    per_second: float


async def pgbench(
    program: Path, url: str, script: str, *, clients: int, seconds: float
) -> PgbenchResult:
    """Run *script* over and over by *clients* at once, each in a connection of its own."""
    with tempfile.TemporaryDirectory(prefix="pgchannels-bench-") as directory:
        path = Path(directory) / "script.sql"
        path.write_text(script)
        command = [
            str(program),
            "--no-vacuum",
            "--protocol=prepared",
            f"--client={clients}",
            "--jobs=2",
            f"--time={max(1, round(seconds))}",
            f"--file={path}",
            url,
        ]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            env={name: value for name, value in os.environ.items() if name[:2] != "PG"},
        )
        output = (await process.communicate())[0].decode(errors="replace")
    transactions = re.search(r"actually processed: (\d+)", output)
    rate = re.search(r"^tps = ([0-9.]+)", output, re.MULTILINE)
    failed = re.search(r"failed transactions: ([1-9]\d*)", output)
    if process.returncode != 0 or transactions is None or rate is None or failed is not None:
        raise RuntimeError(f"pgbench failed:\n{output}")
    return PgbenchResult(int(transactions[1]), float(rate[1]))
