"""The applications in examples/, each made anew for a test, or run as its reader runs it."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import pytest

from pgchannels import forget_channel_layers
from tests.support.demo import until
from tests.support.processes import Processes

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def imported(name: str, **env: str) -> Iterator[ModuleType]:
    """The module ``examples/<name>/app.py``, as it is with these variables."""
    module_name = f"example_{name}_{uuid4().hex}"
    spec = importlib.util.spec_from_file_location(module_name, EXAMPLES / name / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in env.items():
            patch.setenv(variable, value)
        forget_channel_layers()
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            del sys.modules[module_name]
            forget_channel_layers()


class Server:
    """``uvicorn app:app`` in an example's directory, to be killed and started again."""

    def __init__(self, processes: Processes, name: str, env: Mapping[str, str]) -> None:
        self._processes = processes
        self._name = name
        self._env = env
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.was_killed = False
        self._process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Return when it answers."""
        directory = str(EXAMPLES / self._name)
        # One of a test before may still hold the page's sockets; uvicorn takes the port again.
        self._process = self._processes.start(
            "-m", "uvicorn", "app:app", "--app-dir", directory, "--port", str(self._port),
            env=self._env,
        )  # fmt: skip
        until(self._answers)

    def kill(self) -> None:
        self.was_killed = True
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM: it says goodbye to its clients."""
        self.was_killed = True
        self._process.terminate()
        self._process.wait(30)

    def output(self) -> str:
        return self._processes.output(self._process)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.output()
        connection = HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()
