"""``pgchannels demo`` as a process: what it starts, it ends; what it stored, it finds again."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from pgchannels.embedded import EmbeddedPostgres
from tests.support.demo import RunningDemo, is_alive, request, running_demo, start_demo, until
from tests.support.processes import Processes
from tests.support.servers import server_directory

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("crowds")]


@pytest.fixture
def directory() -> Iterator[Path]:
    with server_directory() as path:
        yield path


@pytest.fixture
def server(directory: Path, processes: Processes) -> Iterator[EmbeddedPostgres]:
    """The demo's server, to look at; stopped if a test leaves it behind."""
    server = EmbeddedPostgres(directory / "data")
    yield server
    processes.end_all()
    if server.pid is not None:
        server.start()
        server.stop("immediate")


@pytest.fixture
def options(server: EmbeddedPostgres) -> list[str]:
    return ["--data-dir", str(server.data_dir), "--port", "0", "--restart-after", "0.2"]


def assert_nothing_left(demo: RunningDemo, nodes: list[int], server: EmbeddedPostgres) -> None:
    assert not [pid for pid in nodes if is_alive(pid)]
    assert server.pid is None
    left = [p.info for p in psutil.process_iter(["pid", "cmdline"]) if _mentions(p, server)]
    assert not left
    assert "Traceback" not in demo.output()


def _mentions(process: psutil.Process, server: EmbeddedPostgres) -> bool:
    return any(str(server.data_dir) in part for part in process.info["cmdline"] or [])


def order(url: str, item: str) -> int:
    return int(request(f"{url}/orders", {"item": item})["number"])


def numbers(url: str) -> list[int]:
    page = request(f"{url}/channels/orders/messages?limit=1000")
    return [message["data"]["number"] for message in page["messages"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_the_next_start_finds_the_data(
    processes: Processes, options: list[str], server: EmbeddedPostgres, number: signal.Signals
) -> None:
    demo = running_demo(processes, *options)
    first, second = demo.urls
    placed = [order(first, "Tea"), order(second, "Tea")]
    until(lambda: numbers(first) == placed)
    nodes = demo.pids()
    # As a terminal does: to the whole process group.
    os.killpg(demo.process.pid, number)
    assert demo.process.wait(20) == 0
    assert_nothing_left(demo, nodes, server)

    again = running_demo(processes, *options)
    assert numbers(again.urls[1]) == placed
    placed.append(order(again.urls[1], "Tea"))
    until(lambda: numbers(again.urls[0]) == placed)
    assert again.signal(signal.SIGTERM) == 0


def test_a_rolled_back_order_is_in_neither_table_nor_log(
    processes: Processes, options: list[str]
) -> None:
    demo = running_demo(processes, *options)
    url = demo.urls[0]
    failed = request(f"{url}/orders/rolled-back", {"item": "Tea"})["number"]
    placed = order(url, "Tea")
    assert placed > failed
    until(lambda: numbers(url) == [placed])
    assert [each["number"] for each in request(f"{url}/orders")] == [placed]


def test_a_killed_node_comes_back_on_its_port(processes: Processes, options: list[str]) -> None:
    demo = running_demo(processes, *options)
    first, second = demo.urls
    before = demo.pids()
    with pytest.raises(ConnectionError):
        request(f"{first}/node/kill", {})
    demo.says("node 1 was killed. It is started again in 0.2 s.")
    placed = order(second, "Tea")
    demo.says(f"node 1 is back on {first}")
    after = demo.pids()
    assert after[0] != before[0]
    assert after[1] == before[1]
    until(lambda: numbers(first) == [placed])
    assert demo.signal(signal.SIGINT) == 0


def test_pages_of_other_sites_can_neither_read_nor_write_nor_kill(
    processes: Processes, options: list[str]
) -> None:
    demo = running_demo(processes, *options)
    url = demo.urls[0]
    authority = url.removeprefix("http://")
    evil = {"Origin": "https://evil.example"}
    rebound = {"Host": "evil.example"}
    for path in ("/orders", "/orders/rolled-back", "/node/kill"):
        body = b'{"item": "Tea"}'
        for headers, status in ((evil, 403), (rebound, 400)):
            assert answered(authority, "POST", path, headers, body) == status
    assert answered(authority, "GET", "/orders", rebound) == 400
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert answered(authority, "GET", "/live", upgrade | evil) == 403
    assert answered(authority, "GET", "/live", upgrade | rebound) in (400, 403)
    for origin in (*demo.urls, url.replace("127.0.0.1", "localhost")):
        own = {"Origin": origin}
        assert answered(authority, "GET", "/live", upgrade | own) == 101
        assert answered(authority, "POST", "/orders", own, b'{"item": "Tea"}') == 201
    assert demo.signal(signal.SIGINT) == 0


def answered(
    authority: str, method: str, path: str, headers: dict[str, str], body: bytes | None = None
) -> int:
    """The status of the answer."""
    connection = HTTPConnection(authority, timeout=10)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        return connection.getresponse().status
    finally:
        connection.close()


def test_nodes_do_not_outlive_a_killed_supervisor_and_it_starts_again(
    processes: Processes, options: list[str], server: EmbeddedPostgres
) -> None:
    demo = running_demo(processes, *options)
    placed = [order(demo.urls[0], "Tea")]
    nodes = demo.pids()
    until(lambda: numbers(demo.urls[0]) == placed)
    demo.signal(signal.SIGKILL)
    until(lambda: not any(map(is_alive, nodes)))
    assert server.pid is not None, "a daemon; it waits for the next start"

    again = running_demo(processes, *options)
    assert numbers(again.urls[0]) == placed
    nodes = again.pids()
    assert again.signal(signal.SIGINT) == 0
    assert_nothing_left(again, nodes, server)


def test_a_signal_while_it_starts_ends_everything_too(
    processes: Processes, options: list[str], server: EmbeddedPostgres
) -> None:
    process = start_demo(processes, *options)
    until(lambda: "Starting PostgreSQL" in processes.output(process))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert_nothing_left(RunningDemo(process, processes, []), [], server)


def test_a_data_directory_in_use_is_left_alone(processes: Processes, options: list[str]) -> None:
    demo = running_demo(processes, *options)
    second = start_demo(processes, *options)
    assert second.wait(20) == 1
    assert "pgchannels: another process runs the server on" in processes.output(second)
    assert "Traceback" not in processes.output(second)
    order(demo.urls[0], "Tea")
    assert demo.signal(signal.SIGINT) == 0


def test_another_port_is_taken_if_the_one_asked_for_is_in_use(
    processes: Processes, directory: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        data = str(directory / "data")
        demo = running_demo(processes, "--data-dir", data, "--port", str(port))
        other = demo.urls[0].rpartition(":")[2]
        demo.says(f"Port {port} cannot be used (Address already in use); using {other} instead")
        assert f"http://127.0.0.1:{port}" not in demo.urls
        assert len(set(demo.urls)) == 2
        assert demo.signal(signal.SIGINT) == 0


def test_it_runs_on_a_database_that_is_given(processes: Processes, empty_database_url: str) -> None:
    demo = running_demo(processes, "--database-url", empty_database_url, "--port", "0")
    placed = order(demo.urls[0], "Tea")
    until(lambda: numbers(demo.urls[1]) == [placed])
    assert demo.signal(signal.SIGTERM) == 0
    assert "PostgreSQL" not in demo.output().partition("Ready")[0]
