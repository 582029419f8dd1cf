"""The examples of publishing from elsewhere do what they say."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pgchannels import Message, PostgresLayer, Settings
from tests.support.eventually import eventually

EXAMPLES = Path(__file__).parents[2] / "examples" / "publishing"


@pytest.fixture
async def layer(database_url: str) -> AsyncIterator[PostgresLayer]:
    """A node that finds nothing by itself: it has to be told."""
    settings = Settings(database_url=database_url, poll_interval=600, outbox_poll_interval=600)
    async with PostgresLayer(settings) as layer:
        await eventually(lambda: layer.is_listening)
        yield layer


async def ran(*command: str, database_url: str) -> None:
    """Run it in the directory of the examples; it has to end well, and not to say anything."""
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        cwd=EXAMPLES,
        env={**os.environ, "PGCHANNELS_DATABASE_URL": database_url, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


async def only_message(layer: PostgresLayer) -> Message:
    async with asyncio.timeout(30), layer.subscribe("orders:7", after="0") as messages:
        message = await anext(messages)
    page = await layer.history("orders:7")
    assert page.messages == [message]
    return message


# At exit, a busy machine might not get so far in a second.
PATIENTLY = """
import runpy
import pgchannels.waker
pgchannels.waker._EXIT_TIME = 30.0
"""

TASK = """
import celery_worker as worker
worker.Base.metadata.create_all(worker.engine)
worker.app.conf.task_always_eager = True
assert worker.place_order.delay(7, 20).get() == 1
"""


@pytest.mark.parametrize(
    "script",
    [
        "runpy.run_path('script.py', run_name='__main__')",
        "runpy.run_path('django_orders.py', run_name='__main__')",
        TASK,
    ],
    ids=["psycopg", "django", "celery"],
)
async def test_in_python(layer: PostgresLayer, database_url: str, script: str) -> None:
    await ran(sys.executable, "-c", PATIENTLY + script, database_url=database_url)
    message = await only_message(layer)
    assert (message["type"], message["id"]) == ("order.placed", 1)


async def test_in_sql(layer: PostgresLayer, database_url: str) -> None:
    psql = shutil.which("psql")
    if psql is None:
        pytest.skip("psql is not installed")
    command = (psql, database_url, "-q", "-v", "ON_ERROR_STOP=1", "-f", "psql.sql")
    await ran(*command, database_url=database_url)
    message = await only_message(layer)
    assert (message["type"], message["id"], message["total"]) == ("order.placed", 1, 19.9)


async def test_in_node() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    await ran(node, "--check", "node.mjs", database_url="")


async def test_in_go() -> None:
    gofmt = shutil.which("gofmt")
    if gofmt is None:
        pytest.skip("go is not installed")
    await ran(gofmt, "-e", "-l", "main.go", database_url="")
