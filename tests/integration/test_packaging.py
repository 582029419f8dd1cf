"""What is built is what is installed is what runs: the wheel, far away from the checkout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgchannels import migrate
from tests.support.demo import request, start_demo, until
from tests.support.processes import Processes
from tests.support.servers import server_directory

ROOT = Path(__file__).parents[2]

# The build, and a virtual environment, once a worker.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


def call(*command: str | Path, cwd: Path) -> str:
    # Nothing that would lead back to the checkout.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel made from it."""
    directory = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, cwd=ROOT)
    return directory


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment with the wheel, and this one's other packages."""
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory, symlinks=True)
    scripts = directory / "bin"
    install = ["install", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python")]
    call(*pip, *install, cwd=directory)
    (packages,) = directory.glob("lib/python*/site-packages")
    # A directory that a .pth file adds is searched last, and its own .pth files, such as that of
    # the editable install, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_the_wheel_has_what_it_needs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tracked = {
        f"pgchannels/{target}{path.relative_to(ROOT / source).as_posix()}"
        for source, target in [
            ("pgchannels", ""),
            ("migrations", "_migrations/"),
            ("examples/orders", "_examples/orders/"),
        ]
        for path in (ROOT / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {
        "pgchannels/py.typed",
        "pgchannels/sql/queries.sql",
        "pgchannels/_migrations/env.py",
        "pgchannels/_migrations/versions/0001_log.sql",
        "pgchannels/_examples/orders/app.py",
        "pgchannels/_examples/orders/page/client.js",
    } <= tracked
    assert {name for name in names if ".dist-info/" not in name} == tracked
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_has_the_sources_and_the_tests(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "pgchannels/py.typed",
        "migrations/versions/0001_log.sql",
        "examples/orders/page/page.html",
        "tests/conftest.py",
    } <= names
    assert not [name for name in names if name.startswith((".venv", ".git/", "dist"))]


def test_the_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    where = call(
        installed / "python", "-c", "import pgchannels; print(pgchannels.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert call(installed / "pgchannels", "--version", cwd=tmp_path).startswith("pgchannels ")


def test_it_migrates(installed: Path, empty_database_url: str, tmp_path: Path) -> None:
    options = ("--database-url", empty_database_url)
    assert "created" in call(installed / "pgchannels", "migrate", *options, cwd=tmp_path)
    assert not migrate.is_behind(empty_database_url)
    assert "up to date" in call(
        installed / "pgchannels", "migrate", "--check", *options, cwd=tmp_path
    )
    assert "create table" in call(installed / "pgchannels", "migrate", "--sql", cwd=tmp_path)


@pytest.fixture
def directory() -> Iterator[Path]:
    with server_directory() as path:
        yield path


def test_it_runs_the_demo(installed: Path, processes: Processes, directory: Path) -> None:
    # Processes starts this environment's Python, which becomes the other one's.
    become = "import os, sys; os.chdir(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"
    process = start_demo(
        processes,
        *("--data-dir", str(directory / "data"), "--port", "0"),
        program=("-c", become, str(directory), str(installed / "pgchannels")),
    )
    until(lambda: "Ctrl-C" in processes.output(process) or process.poll() is not None)
    (url, _) = [word for word in processes.output(process).split() if word.startswith("http://")]
    assert request(f"{url}/orders", {"item": "Tea"})["item"] == "Tea"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
