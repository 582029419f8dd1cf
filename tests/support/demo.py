"""``pgchannels demo``, started as its user does, for the tests that watch it and use it."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psutil

from tests.support.processes import Processes

T = TypeVar("T")

TIME = 30.0
READY = re.compile(r"^ +(node \d)   (http://\S+)$", re.MULTILINE)


def until(condition: Callable[[], T], *, timeout: float = TIME) -> T:
    """Poll *condition* until it is true; what `eventually` is to asynchronous tests."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s; the last value: {value!r}")
        time.sleep(0.02)
    return value


def script() -> Path:
    """The console script of this environment."""
    return Path(sysconfig.get_path("scripts")) / "pgchannels"


def request(url: str, body: object = None) -> Any:
    """GET, or POST if there is a body, around any proxy; the answer's JSON."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=10)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    try:
        if body is None:
            connection.request("GET", path)
        else:
            json_type = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), json_type)
        response = connection.getresponse()
        content = response.read()
        assert response.status < 300, (url, response.status, content)
        return json.loads(content)
    finally:
        connection.close()


def is_alive(pid: int) -> bool:
    try:
        # An orphan stays a zombie where nobody reaps it, as in many containers.
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass
class RunningDemo:
    process: subprocess.Popen[bytes]
    processes: Processes
    urls: list[str]

    def output(self) -> str:
        return self.processes.output(self.process)

    def says(self, text: str, times: int = 1) -> None:
        """Wait for it to say *text*."""
        until(lambda: self.output().count(text) >= times)

    def pids(self) -> list[int]:
        """Of its nodes."""
        return [int(request(f"{url}/node")["pid"]) for url in self.urls]

    def signal(self, number: int) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIME)


def start_demo(
    processes: Processes, *options: str, program: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    return processes.start(*(program or (str(script()),)), "demo", *options)


def running_demo(processes: Processes, *options: str) -> RunningDemo:
    """Start it, wait until it is ready."""
    process = start_demo(processes, *options)

    def is_ready() -> bool:
        assert process.poll() is None, processes.output(process)
        return "Ready" in processes.output(process) and "Ctrl-C" in processes.output(process)

    until(is_ready)
    urls = [url for _, url in READY.findall(processes.output(process))]
    assert len(urls) == 2
    return RunningDemo(process, processes, urls)
