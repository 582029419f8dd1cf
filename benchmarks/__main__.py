"""``python -m benchmarks``: all of them, or those that are named."""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from benchmarks import (
    ceiling,
    connections,
    fanout,
    held_open,
    latency,
    members,
    models,
    receivers,
    slow_sockets,
    sockets,
    throughput,
    transactions,
    watched,
)
from benchmarks.context import Context
from benchmarks.loop import run
from benchmarks.report import machine_facts, table, write_json
from benchmarks.server import Server, embedded_server, named_server

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        latency,
        throughput,
        transactions,
        models,
        watched,
        fanout,
        sockets,
        slow_sockets,
        connections,
        ceiling,
        held_open,
        members,
        receivers,
    )
}

# Columns, where there is no terminal to ask.
_WIDTH = 120


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure pgchannels. Medians of several runs; the ratios compare what was "
        "measured in turns, and are what to look at.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        help=f"some of: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("--runs", type=int, metavar="N", help="of each variant (5; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="shorter and fewer runs, more noise")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=Path("bench.json"),
        help="where every value goes (bench.json)",
    )
    parser.add_argument(
        "--database-url",
        metavar="URL",
        help="a PostgreSQL to measure on, as a superuser, in databases that are created and "
        "dropped; without it, one is started",
    )
    parsed = parser.parse_args()
    if parsed.runs is None:
        parsed.runs = 2 if parsed.quick else 5
    if parsed.runs < 1:
        parser.error("--runs must be 1 or more")
    return parsed


async def measure(options: argparse.Namespace, server: Server, console: Console) -> None:
    start = time.monotonic()
    facts = await machine_facts(server)
    for name, fact in facts.items():
        console.print(f"[dim]{name}: {fact}[/]", highlight=False)
    results = []
    with console.status("") as status:
        for name in options.only:
            benchmark = BENCHMARKS[name]

            def progress(text: str, name: str = name) -> None:
                status.update(f"{name}: {text}")

            context = Context(server, options.runs, options.quick, progress)
            figures = await benchmark.measure(context)
            results.append((benchmark, figures))
            console.print(table(benchmark, figures))
            write_json(options.json, facts, options.runs, results)
    console.print(f"{time.monotonic() - start:.0f} s; every value is in {options.json}")


def main() -> None:
    options = arguments()
    server: AbstractContextManager[Server] = (
        named_server(options.database_url) if options.database_url else embedded_server()
    )
    with server as running:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH)
        run(measure(options, running, console))


main()
