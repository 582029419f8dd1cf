"""Fixtures for every test: a server per worker, a database per test, nothing left behind."""

from __future__ import annotations

import asyncio
import inspect
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_postgresql.executors import NoopExecutor

from pgchannels.embedded import EmbeddedPostgres
from pgchannels.migrate import upgrade
from tests.support import servers
from tests.support.processes import Processes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres",
        type=int,
        default=18,
        metavar="VERSION",
        help="major version of the PostgreSQL server: 18 (default), or 16, the oldest supported",
    )


def pytest_configure() -> None:
    # A shell ignores SIGINT in what it runs in the background, and processes inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "faults" in item.path.parts:
            # They keep several processes busy. At the same time, they would test the machine.
            item.add_marker(pytest.mark.xdist_group("faults"))
    # So that nobody waits for one of these in the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def postgres_version(pytestconfig: pytest.Config) -> int:
    version: int = pytestconfig.getoption("--postgres")
    return version


@pytest.fixture(scope="session")
def postgres(postgres_version: int) -> Iterator[EmbeddedPostgres]:
    """The server that this worker's tests share; one to stop or restart is `own_server`.

    It does without the disk: what that is for, the end of the whole machine, no test has.
    """
    with servers.running_server(postgres_version, is_volatile=True) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_noproc(postgres: EmbeddedPostgres) -> NoopExecutor:
    """In place of pytest-postgresql's fixture of that name, whose host is fixed at import."""
    return servers.executor(postgres)


@pytest.fixture(scope="session")
def template_database(postgres: EmbeddedPostgres, postgresql_noproc: NoopExecutor) -> Iterator[str]:
    with servers.template(postgres, postgresql_noproc) as name:
        yield name


@pytest.fixture
def database_url(
    postgres: EmbeddedPostgres, postgresql_noproc: NoopExecutor, template_database: str
) -> Iterator[str]:
    """The URL of a new, migrated database."""
    with servers.fresh_database(postgresql_noproc, template=template_database) as name:
        yield postgres.url(name)


@pytest.fixture
def empty_database_url(
    postgres: EmbeddedPostgres, postgresql_noproc: NoopExecutor
) -> Iterator[str]:
    """The URL of a new database without the schema."""
    with servers.fresh_database(postgresql_noproc) as name:
        yield postgres.url(name)


@pytest.fixture
def own_server(postgres_version: int) -> Iterator[EmbeddedPostgres]:
    """A server to stop, restart and kill; `url()` is that of a migrated database."""
    with servers.running_server(postgres_version) as server:
        upgrade(server.url())
        yield server


@pytest.fixture
def make_server(postgres_version: int) -> Iterator[Callable[[], EmbeddedPostgres]]:
    """A factory of servers like `own_server`, for tests that need more than one."""
    with ExitStack() as stack:

        def make() -> EmbeddedPostgres:
            server = stack.enter_context(servers.running_server(postgres_version))
            upgrade(server.url())
            return server

        yield make


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts Python processes, and ends them with the test."""
    started = Processes(tmp_path)
    try:
        yield started
    finally:
        started.end_all()


@pytest.fixture(autouse=True)
def _no_tasks_left(request: pytest.FixtureRequest) -> None:
    # A detour that spares synchronous tests the event loop of an asynchronous fixture.
    test = getattr(request.node, "function", None)
    # Hypothesis wraps the coroutine function in a synchronous one.
    test = getattr(getattr(test, "hypothesis", None), "inner_test", test)
    if inspect.iscoroutinefunction(test):
        request.getfixturevalue("_task_guard")


@pytest.fixture
async def _task_guard() -> AsyncIterator[None]:
    """Fail a test that leaves tasks running: each has an owner that awaits it.

    Set up first, and so torn down after the fixtures that own tasks.
    """
    before = asyncio.all_tasks()
    yield
    for _ in range(10):
        # A task that has just been cancelled gets a few rounds of the loop to end.
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if not left:
        return
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    pytest.fail("tasks left running:\n" + "\n".join(map(repr, left)))


@pytest.fixture(autouse=True)
def _no_waker_left() -> Iterator[None]:
    """End the threads that tell nodes of commits; they would live on, in other tests."""
    yield
    loaded = sys.modules.get("pgchannels.waker")
    if loaded is not None:
        threads = [waker.stop() for waker in loaded._wakers.values()]
        loaded._wakers.clear()
        for thread in threads:
            if thread is not None:
                thread.join(20)
                assert not thread.is_alive()
