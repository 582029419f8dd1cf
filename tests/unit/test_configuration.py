"""Layers by alias: from a dictionary, from the environment, and those that cannot be."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from pgchannels.configuration import (
    forget_channel_layers,
    get_channel_layer,
    get_channel_layer_from_env,
)
from pgchannels.errors import ConfigurationError
from pgchannels.layer import ChannelLayer
from pgchannels.memory import MemoryLayer
from pgchannels.payloads import DEFAULT
from pgchannels.postgres import PostgresLayer
from pgchannels.settings import Settings

URL = "postgresql://user:s3cret@host/database"
MEMORY = {"BACKEND": "memory"}

# A module of the application's own, found by its path.
THEIRS = """
import orjson
from pgchannels.memory import MemoryLayer
from pgchannels.layer import ChannelLayer

class Theirs(MemoryLayer):
    class Nested(MemoryLayer): ...

class Unfinished(ChannelLayer): ...

class Spelling:
    def dumps(self, payload): return orjson.dumps(payload).decode()
    loads = staticmethod(orjson.loads)

spelling = Spelling()
nothing = object()
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in os.environ:
        if name.upper().startswith("PGCHANNELS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    forget_channel_layers()
    yield
    forget_channel_layers()


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    (tmp_path / "their_layers.py").write_text(THEIRS)
    (tmp_path / "their_broken.py").write_text("import a_module_that_is_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("their_layers", None)


class TestDictionary:
    def test_short_names(self) -> None:
        layers = {"default": {"BACKEND": "postgres", "CONFIG": {"database_url": URL}}, "t": MEMORY}
        layer = get_channel_layer(layers)
        assert type(layer) is PostgresLayer
        assert layer.settings.dsn == URL
        assert layer.serializer is DEFAULT
        assert type(get_channel_layer(layers, "t")) is MemoryLayer

    @pytest.mark.usefixtures("theirs")
    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("their_layers.Theirs", "Theirs"),
            ("their_layers:Theirs", "Theirs"),
            ("their_layers:Theirs.Nested", "Theirs.Nested"),
            ("pgchannels.memory.MemoryLayer", "MemoryLayer"),
        ],
    )
    def test_dotted_paths(self, path: str, name: str) -> None:
        layer = get_channel_layer({"default": {"BACKEND": path, "CONFIG": {"page_size": 7}}})
        assert type(layer).__qualname__ == name
        assert layer.settings.page_size == 7

    def test_every_setting_can_be_given(self) -> None:
        """In lower and in upper case; a value that is not the default arrives."""
        config: dict[str, Any] = {
            "database_url": "postgresql://h/d",
            "LISTEN_URL": "postgresql://h/e",
            "schema_name": "other",
            "POOL_SIZE": 7,
            "command_timeout": 8,
            "max_message_size": 1000,
            "poll_interval": 0.5,
            "outbox_poll_interval": 0.1,
            "heartbeat_interval": 2,
            "lease_time": 9,
            "batch_size": 11,
            "page_size": 12,
            "page_bytes": 2000,
            "buffer_size": 13,
            "buffer_bytes": 3000,
            "retention": "P2D",
            "default_ttl": 60,
            "CAPACITY": 100,
            "key_lifetime": "PT1H",
            "group_expiry": 0,
            "presence_grace": 1.5,
            "prune_interval": 14,
        }
        assert {name.lower() for name in config} == set(Settings.model_fields)
        layer = get_channel_layer({"default": {"BACKEND": "memory", "CONFIG": config}})
        assert layer.settings == Settings(**{name.lower(): v for name, v in config.items()})
        defaults = Settings()
        for name in Settings.model_fields:
            assert getattr(layer.settings, name) != getattr(defaults, name)

    def test_the_rest_is_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGCHANNELS_DATABASE_URL", URL)
        monkeypatch.setenv("PGCHANNELS_POOL_SIZE", "7")
        monkeypatch.setenv("PGCHANNELS__REPORTS__BACKEND", "memory")
        monkeypatch.setenv("PGCHANNELS__REPORTS__POOL_SIZE", "8")
        config = {"page_size": 9, "pool_size": 6}
        layers: dict[str, dict[str, Any]] = {"default": {"CONFIG": config}, "reports": {}}
        layer = get_channel_layer(layers)
        assert type(layer) is PostgresLayer
        assert (layer.settings.dsn, layer.settings.page_size) == (URL, 9)
        assert layer.settings.pool_size == 6
        other = get_channel_layer(layers, "reports")
        assert type(other) is MemoryLayer
        assert (other.settings.pool_size, other.settings.database_url) == (8, None)

    def test_what_it_says_goes_before_the_environment(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGCHANNELS_BACKEND", "postgres")
        monkeypatch.setenv("PGCHANNELS_DATABASE_URL", URL)
        assert type(get_channel_layer({"default": MEMORY})) is MemoryLayer

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ("reports", "not str; an alias alone is given as alias=…"),
            ([], "not list"),
            ({}, "has no channel layer 'default'$"),
            ({"defualt": MEMORY}, r"no channel layer 'default' \(did you mean defualt\?\)"),
            ({"default": MEMORY, "a b": MEMORY}, "'a b' is no alias"),
            ({"default": "memory"}, "channel layer 'default': expected .* not str"),
            ({"default": {"backend": "memory"}}, r"'backend' is neither .* mean BACKEND\?"),
            ({"default": {"BACKEND": MemoryLayer}}, "BACKEND is <class .*MemoryLayer"),
            ({"default": {"CONFIG": None}}, "CONFIG must be a dictionary, not NoneType"),
            ({"default": {"CONFIG": {1: 2}}}, "CONFIG has 1, "),
            ({"default": {"CONFIG": {"PAGE_SIZE": 2, "page_size": 2}}}, "page_size twice"),
            (
                {"default": {"CONFIG": {"pool_sise": 2}}},
                r"channel layer 'default': .* pool_sise \(did you mean pool_size\?\)",
            ),
            ({"default": {"CONFIG": {"_env_file": "x"}}}, "no setting _env_file"),
            ({"default": {}}, "channel layer 'default': no database: set PGCHANNELS_DATABASE_URL"),
            (
                {"default": {"BACKEND": "memory", "CONFIG": {"pool_size": 0}}},
                r"channel layer 'default': pool_size \(PGCHANNELS_POOL_SIZE\) is 0: ",
            ),
            (
                {"default": {"BACKEND": "memory", "CONFIG": {"lease_time": 1}}},
                r"lease_time \(.* is 1 s, .* heartbeat_interval .* 5 s",
            ),
        ],
    )
    def test_what_cannot_be(self, settings: Any, expected: str) -> None:
        with pytest.raises(ConfigurationError, match=expected):
            get_channel_layer(settings)

    @pytest.mark.parametrize(
        "settings",
        [
            URL,
            {"default": URL},
            {"default": {"BACKEND": URL}},
            {"default": {"CONFIG": URL}},
            {"default": {"BACKEND": "memory", "CONFIG": {"serializer": URL}}},
            {"default": {"BACKEND": "memory", "CONFIG": {"pool_size": URL}}},
        ],
    )
    def test_a_misplaced_url_is_not_repeated(self, settings: Any) -> None:
        with pytest.raises(ConfigurationError) as raised:
            get_channel_layer(settings)
        assert "s3cret" not in "".join(traceback.format_exception(raised.value, limit=0))

    def test_an_alias_is_named(self) -> None:
        layers = {"default": MEMORY, "reports": {"CONFIG": {"pool_size": 0}}}
        expected = r"'reports': pool_size \(PGCHANNELS__REPORTS__POOL_SIZE\) is 0"
        with pytest.raises(ConfigurationError, match=expected):
            get_channel_layer(layers, "reports")


@pytest.mark.usefixtures("theirs")
class TestBackends:
    @pytest.mark.parametrize(
        ("backend", "expected"),
        [
            (
                "postgress",
                r"expected postgres, memory or a dotted path \(.* postgres\?\)",
            ),
            ("", "expected postgres"),
            (".their_layers", "expected postgres"),
            ("their_layers:", "expected postgres"),
            ("their_layers.Absent", "no attribute 'Absent'"),
            ("their_absent.Theirs", "No module named 'their_absent'"),
            ("their_broken.Theirs", "No module named 'a_module_that_is_not_installed'"),
            ("their_layers.nothing", "no subclass of ChannelLayer"),
            ("their_layers.Spelling", "no subclass of ChannelLayer"),
            ("their_layers.Unfinished", "does not implement .*, close, .*, open, "),
        ],
    )
    def test_what_is_none(
        self, monkeypatch: pytest.MonkeyPatch, backend: str, expected: str
    ) -> None:
        where = rf"BACKEND \(PGCHANNELS_BACKEND\) is '{backend}'.*"
        with pytest.raises(ConfigurationError, match=where + expected):
            get_channel_layer({"default": {"BACKEND": backend}})
        monkeypatch.setenv("PGCHANNELS__REPORTS__BACKEND", backend)
        where = where.replace("PGCHANNELS_", "PGCHANNELS__REPORTS__")
        with pytest.raises(ConfigurationError, match=where + expected):
            get_channel_layer(alias="reports")


class Upper:
    """A serialiser whose texts can be told from the default one's."""

    def dumps(self, payload: Mapping[str, Any]) -> str:
        return orjson.dumps({name.upper(): value for name, value in payload.items()}).decode()

    def loads(self, text: str) -> dict[str, Any]:
        loaded: dict[str, Any] = orjson.loads(text)
        return loaded


@pytest.mark.usefixtures("theirs")
class TestSerializers:
    async def test_an_object(self) -> None:
        config = {"SERIALIZER": Upper()}
        async with get_channel_layer({"default": {**MEMORY, "CONFIG": config}}) as layer:
            await layer.send("a", {"text": "hello"})
            message = await layer.receive("a", timeout=0)
            assert dict(message) == {"TEXT": "hello"}

    @pytest.mark.parametrize("path", ["their_layers.Spelling", "their_layers:spelling"])
    def test_a_path(self, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
        layer = get_channel_layer({"default": {**MEMORY, "CONFIG": {"serializer": path}}})
        assert type(layer.serializer).__name__ == "Spelling"
        monkeypatch.setenv("PGCHANNELS__REPORTS__BACKEND", "memory")
        monkeypatch.setenv("PGCHANNELS__REPORTS__SERIALIZER", path)
        layer = get_channel_layer(alias="reports")
        assert type(layer.serializer).__name__ == "Spelling"

    @pytest.mark.parametrize(
        ("serializer", "expected"),
        [
            ("json", "expected a dotted path"),
            ("their_layers.absent", "no attribute 'absent'"),
            ("their_layers.nothing", r"must have dumps\(\) and loads\(\)"),
            (3, r"3, but must have dumps\(\) and loads\(\)"),
        ],
    )
    def test_what_is_none(self, serializer: object, expected: str) -> None:
        layers = {"default": {**MEMORY, "CONFIG": {"serializer": serializer}}}
        where = r"serializer \(PGCHANNELS_SERIALIZER\) is .*"
        with pytest.raises(ConfigurationError, match=where + expected):
            get_channel_layer(layers)


class TestEnvironment:
    def test_the_default_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGCHANNELS_DATABASE_URL", URL)
        layer = get_channel_layer_from_env()
        assert type(layer) is PostgresLayer
        assert layer.settings.dsn == URL
        assert get_channel_layer() is get_channel_layer_from_env() is layer

    def test_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGCHANNELS_BACKEND", "memory")
        monkeypatch.setenv("PGCHANNELS_POOL_SIZE", "7")
        monkeypatch.setenv("PGCHANNELS__REPORTS_2__DATABASE_URL", URL)
        monkeypatch.setenv("PGCHANNELS__REPORTS_2__PAGE_SIZE", "8")
        layer, other = get_channel_layer(), get_channel_layer(alias="reports_2")
        assert (type(layer), type(other)) == (MemoryLayer, PostgresLayer)
        assert (layer.settings.pool_size, layer.settings.page_size) == (7, 1000)
        assert (other.settings.pool_size, other.settings.page_size) == (5, 8)

    def test_a_dotenv_file(self) -> None:
        Path(".env").write_text(
            "PGCHANNELS_BACKEND=memory\nPGCHANNELS__REPORTS__BACKEND=memory\n"
            "PGCHANNELS__REPORTS__PAGE_SIZE=8\nPGCHANNELS__TYPO__SIZE=8\n"
        )
        assert type(get_channel_layer_from_env()) is MemoryLayer
        assert get_channel_layer_from_env("reports").settings.page_size == 8
        with pytest.raises(ConfigurationError, match="nothing reads PGCHANNELS__TYPO__SIZE"):
            get_channel_layer_from_env("typo")

    def test_no_database(self) -> None:
        with pytest.raises(ConfigurationError, match=r"'default': .* PGCHANNELS_DATABASE_URL"):
            get_channel_layer()

    def test_an_alias_does_not_fall_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGCHANNELS_DATABASE_URL", URL)
        monkeypatch.setenv("PGCHANNELS__REPORTS__POOL_SIZE", "7")
        with pytest.raises(ConfigurationError, match="set PGCHANNELS__REPORTS__DATABASE_URL"):
            get_channel_layer_from_env("reports")

    def test_an_alias_that_nothing_configures(self) -> None:
        get_channel_layer({"default": MEMORY, "reports": MEMORY})
        for get in (lambda a: get_channel_layer(alias=a), get_channel_layer_from_env):
            with pytest.raises(ConfigurationError) as raised:
                get("reprots")
            assert "'reprots' (did you mean reports?)" in str(raised.value)
            assert "PGCHANNELS__REPROTS__DATABASE_URL" in str(raised.value)

    @pytest.mark.parametrize(
        ("alias", "variable", "meant"),
        [
            ("reports", "PGCHANNELS__REPORTS__POOLSIZE", "PGCHANNELS__REPORTS__POOL_SIZE"),
            ("reports", "pgchannels__reports__lease", "PGCHANNELS__REPORTS__LEASE_TIME"),
            ("default", "PGCHANNELS__DEFAULT__DATABASE_URL", "PGCHANNELS_DATABASE_URL"),
        ],
    )
    def test_an_aliass_unknown_variable_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, alias: str, variable: str, meant: str
    ) -> None:
        monkeypatch.setenv(variable, "1")
        for settings in (None, {alias: MEMORY}):
            with pytest.raises(ConfigurationError) as raised:
                get_channel_layer(settings, alias)
            assert f"nothing reads {variable.upper()} (did you mean {meant}?)" in str(raised.value)

    @pytest.mark.parametrize(
        ("variable", "hint"),
        [
            ("PGCHANNELS_POOLSIZE", " (did you mean PGCHANNELS_POOL_SIZE?)"),
            ("PGCHANNELS__PAGE_SIZE", " (did you mean PGCHANNELS_PAGE_SIZE?)"),
            ("PGCHANNELS_XYZ", ""),
        ],
    )
    def test_an_unknown_variable_is_logged(
        self,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        variable: str,
        hint: str,
    ) -> None:
        monkeypatch.setenv(variable, "s3cret")
        get_channel_layer({"default": MEMORY})
        get_channel_layer()
        logged = [(record.levelno, record.getMessage()) for record in caplog.records]
        assert logged == [(logging.WARNING, f"nothing reads {variable}{hint}")]

    def test_what_others_set_is_not_logged(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for variable in (
            "PGCHANNELS_SERVICE_HOST",
            "PGCHANNELS_SERVICE_PORT",
            "PGCHANNELS_SERVICE_PORT_HTTP",
            "PGCHANNELS_PORT",
            "PGCHANNELS_PORT_80_TCP_ADDR",
            "PGCHANNELS__REPORTS__POOLSIZE",
            "PGCHANNELSX",
        ):
            monkeypatch.setenv(variable, "1")
        get_channel_layer({"default": MEMORY})
        assert caplog.records == []


class TestRegistry:
    def test_once(self) -> None:
        layers = {"default": MEMORY, "reports": {"BACKEND": "memory", "CONFIG": {"POOL_SIZE": 7}}}
        layer = get_channel_layer(layers)
        # A dictionary that says the same is the same.
        same = {"default": MEMORY, "reports": {"BACKEND": "memory", "CONFIG": {"pool_size": 7}}}
        assert get_channel_layer(same) is get_channel_layer() is layer
        # All of it is remembered.
        other = get_channel_layer(alias="reports")
        assert other.settings.pool_size == 7
        assert get_channel_layer(layers, "reports") is other is not layer

    def test_a_taken_alias(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layers = {"default": MEMORY, "reports": MEMORY}
        layer = get_channel_layer(layers)
        for alias in layers:
            different = {**layers, alias: {**MEMORY, "CONFIG": {"pool_size": 7}}}
            with pytest.raises(ConfigurationError, match=f"'{alias}' is configured otherwise"):
                get_channel_layer(different)
        monkeypatch.setenv("PGCHANNELS_BACKEND", "memory")
        with pytest.raises(ConfigurationError, match="'default' is configured otherwise"):
            get_channel_layer_from_env()
        assert get_channel_layer() is layer

    def test_a_dictionary_that_changes(self) -> None:
        config: dict[str, Any] = {"pool_size": 7}
        layers = {"default": {**MEMORY, "CONFIG": config}}
        get_channel_layer(layers)
        config["pool_size"] = 8
        with pytest.raises(ConfigurationError, match="configured otherwise"):
            get_channel_layer(layers)

    def test_a_failure_takes_no_alias(self) -> None:
        with pytest.raises(ConfigurationError, match="no database"):
            get_channel_layer({"default": {}})
        assert type(get_channel_layer({"default": MEMORY})) is MemoryLayer

    def test_forgetting(self) -> None:
        layer = get_channel_layer({"default": MEMORY})
        forget_channel_layers()
        different = {"default": {**MEMORY, "CONFIG": {"pool_size": 7}}}
        assert get_channel_layer(different) is not layer

    def test_threads_get_the_same(self) -> None:
        count = 16
        together = threading.Barrier(count)
        found: list[ChannelLayer] = []

        def get() -> None:
            together.wait()
            found.append(get_channel_layer({"default": MEMORY}))

        threads = [threading.Thread(target=get) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == count
        assert len(set(map(id, found))) == 1

    def test_a_backend_that_asks_for_a_layer_while_it_is_imported(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "their_asking.py").write_text(
            "from pgchannels.configuration import get_channel_layer\n"
            "from pgchannels.memory import MemoryLayer\n"
            "other = get_channel_layer({'other': {'BACKEND': 'memory'}}, 'other')\n"
            "class Asking(MemoryLayer): ...\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        layer = get_channel_layer({"default": {"BACKEND": "their_asking.Asking"}})
        asking = sys.modules.pop("their_asking")
        assert type(layer) is asking.Asking
        assert get_channel_layer(alias="other") is asking.other

    async def test_it_is_not_open(self) -> None:
        layer = get_channel_layer({"default": MEMORY})
        async with layer:
            await layer.send("a", {"n": 1})
            assert (await get_channel_layer().receive("a", timeout=0))["n"] == 1
