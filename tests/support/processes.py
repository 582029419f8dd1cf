"""Python processes that end with the test, whatever happens in it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

GRACE = 10.0


class Processes:
    """Starts Python processes, each in a group of its own, and ends them all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, *arguments: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run ``python *arguments``, in this environment with ``env`` on top."""
        # A file, because nobody may be reading, and a full pipe would stop the process.
        with self._output_file(len(self._started)).open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def output(self, process: subprocess.Popen[bytes]) -> str:
        """What the process has written so far, to stdout and stderr."""
        return self._output_file(self._started.index(process)).read_text(errors="replace")

    def end_all(self) -> None:
        """SIGTERM; SIGKILL to what is left after a while, and to the children of all."""
        for process in self._started:
            if process.poll() is None:
                # A process that a test has stopped does not see SIGTERM before SIGCONT.
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
        for process in self._started:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            finally:
                self._kill_group(process)

    def _output_file(self, index: int) -> Path:
        return self._directory / f"process-{index}.log"

    @staticmethod
    def _kill_group(process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
