"""What benchmarks ask of the log from outside, and what they have executed on the side."""

from __future__ import annotations

import asyncio

import asyncpg

from benchmarks.arrivals import now

__all__ = ["all_sealed", "execute", "sealed"]

_PATIENCE = 60.0


async def sealed(url: str) -> int:
    """How many messages have ever come into the log."""
    connection = await asyncpg.connect(url)
    try:
        count: int = await connection.fetchval(
            "select coalesce(max(last_id), 0) from pgchannels.batches"
        )
    finally:
        await connection.close()
    return count


async def all_sealed(url: str, expected: int) -> None:
    """Wait until *expected* messages have come into the log, exactly."""
    deadline = now() + _PATIENCE
    while (count := await sealed(url)) != expected:
        if count > expected or now() > deadline:
            raise RuntimeError(f"{count} messages are in the log instead of {expected}")
        await asyncio.sleep(0.02)


async def execute(url: str, statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()
