"""How a benchmark talks to its peers: a line of JSON each way, over the peer's stdin and stdout."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

__all__ = ["Peer", "serve"]

_ROOT = Path(__file__).parents[2]
_LINE_LIMIT = 64 * 1024 * 1024
_GRACE = 10.0


class Peer:
    """A process that runs ``benchmarks.peers.<name>``, while this context manager is entered."""

    def __init__(self, name: str, *arguments: str) -> None:
        self._command = ("-m", f"benchmarks.peers.{name}", *arguments)
        self._process: Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._command,
            cwd=_ROOT,
            stdin=PIPE,
            stdout=PIPE,
            limit=_LINE_LIMIT,
            # Ctrl-C is for the benchmark, which then closes stdin.
            start_new_session=True,
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_GRACE):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def ask(self, request: str, /, **arguments: Any) -> Any:
        """Have one of the peer's functions called, and return what it returned."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = orjson.dumps([request, arguments], option=orjson.OPT_APPEND_NEWLINE)
        self._process.stdin.write(line)
        await self._process.stdin.drain()
        answer = await self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self._command)} has ended while asked to {request}")
        return orjson.loads(answer)


async def serve(functions: Mapping[str, Callable[..., object | Awaitable[object]]]) -> None:
    """In the peer: call what is asked for, one after the other, until stdin is closed."""
    requests = asyncio.StreamReader(limit=_LINE_LIMIT)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    while line := await requests.readline():
        name, arguments = orjson.loads(line)
        result = functions[name](**arguments)
        if inspect.isawaitable(result):
            result = await result
        _write_all(orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE))


def _write_all(data: bytes) -> None:
    # Not through print(): stdout may be a buffered text stream, and nothing else goes there.
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]
