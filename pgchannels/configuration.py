"""Channel layers by alias: made once from a dictionary or the environment, found from anywhere.

::

    LAYERS = {
        "default": {"BACKEND": "postgres", "CONFIG": {"database_url": "postgresql://…"}},
        "test": {"BACKEND": "memory"},
    }

    layer = get_channel_layer(LAYERS)             # where the application is put together
    layer = get_channel_layer()                   # anywhere else: the same object
    other = get_channel_layer(LAYERS, "test")

``BACKEND`` is ``postgres``, ``memory``, or the dotted path of a :class:`ChannelLayer` of your own,
which is called with settings and, if one is configured, ``serializer=``. ``CONFIG`` has settings by
name, in lower or upper case, and ``serializer``: an object, or the dotted path of one or its class.

What a dictionary does not say is read from the environment and ``.env``: ``PGCHANNELS_BACKEND``,
``PGCHANNELS_SERIALIZER`` and the ``PGCHANNELS_…`` of :class:`Settings`; for another alias than
``default``, ``PGCHANNELS__<ALIAS>__…``. So no dictionary is needed at all. An alias never takes the
variables of the default one: see :meth:`Settings.for_alias`.

Layers are made, not opened: to open and close one is the application's, in its event loop.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from inspect import isabstract
from operator import attrgetter
from typing import Any

from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    SettingsConfigDict,
)

from pgchannels.errors import ConfigurationError
from pgchannels.layer import ChannelLayer
from pgchannels.payloads import Serializer
from pgchannels.settings import (
    DEFAULT_ALIAS,
    ENV_FILE,
    Settings,
    did_you_mean,
    env_prefix,
    shown_value,
)

__all__ = ["forget_channel_layers", "get_channel_layer", "get_channel_layer_from_env"]

logger = logging.getLogger("pgchannels.configuration")

# By path, so that nothing is imported before it is asked for.
BACKENDS = {
    "postgres": "pgchannels.postgres:PostgresLayer",
    "memory": "pgchannels.memory:MemoryLayer",
}

_PATH = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*|\w+(\.\w+)+")
# Variables of other aliases, and those that Kubernetes sets for a service that is named pgchannels.
_OTHERS = re.compile(
    r"PGCHANNELS_(_[A-Z0-9]+(_[A-Z0-9]+)*__\w+|(SERVICE_)?PORT(_\w+)?|SERVICE_HOST)"
)


@dataclass(frozen=True)
class _Definition:
    """What a dictionary says about one layer. An empty one: all is in the environment."""

    backend: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class _Choices(BaseSettings):
    """What a layer is made of, beside its settings; from the same places as those."""

    model_config = SettingsConfigDict(env_file=ENV_FILE, extra="ignore", hide_input_in_errors=True)

    backend: str = "postgres"
    serializer: Any = None


_definitions: dict[str, _Definition] = {}
_layers: dict[str, ChannelLayer] = {}
# Never held while a backend is imported: the import may wait for another thread's, which may wait
# for a layer.
_lock = threading.Lock()


def get_channel_layer(
    settings: Mapping[str, Any] | None = None, alias: str = DEFAULT_ALIAS
) -> ChannelLayer:
    """The layer of an alias: the same one for the whole process, from any thread. Not opened.

    Args:
        settings: layers by alias, as above. All of them are remembered, and made when they are
            first asked for. None: the one that is known under the alias, or else one from the
            environment.
        alias: lower-case letters, digits and single underscores.

    Raises:
        ConfigurationError: the layer cannot be made as it is configured, or the alias is taken by
            one that is configured otherwise. The text names settings, variables and values.
    """
    prefix = env_prefix(alias)
    definitions = {} if settings is None else _read(settings)
    if settings is not None and alias not in definitions:
        raise ConfigurationError(
            f"the dictionary has no channel layer {alias!r}{did_you_mean(alias, definitions)}"
        )
    definition = definitions.get(alias) or _definitions.get(alias)
    if definition is None:
        _check_configured(alias, prefix)
        definition = _Definition()
    layer = _layers.get(alias)
    if layer is None:
        layer = _make(alias, definition)
    return _remember(alias, layer, {alias: definition, **definitions})


def get_channel_layer_from_env(alias: str = DEFAULT_ALIAS) -> ChannelLayer:
    """As :func:`get_channel_layer`, of the environment and ``.env`` alone.

    Raises:
        ConfigurationError: as there; so if a dictionary says anything about the alias.
    """
    prefix = env_prefix(alias)
    if alias not in _definitions:
        _check_configured(alias, prefix)
    return get_channel_layer({alias: {}}, alias)


def forget_channel_layers() -> None:
    """Forget all dictionaries and layers, so that tests begin afresh. It closes nothing."""
    with _lock:
        _definitions.clear()
        _layers.clear()


def _remember(
    alias: str, layer: ChannelLayer, definitions: Mapping[str, _Definition]
) -> ChannelLayer:
    with _lock:
        for name, definition in definitions.items():
            if _definitions.get(name, definition) != definition:
                raise ConfigurationError(
                    f"the channel layer {name!r} is configured otherwise already, by another "
                    "dictionary or from the environment"
                )
        _definitions.update(definitions)
        # Another thread may have been faster: then its layer is the one.
        return _layers.setdefault(alias, layer)


def _check_configured(alias: str, prefix: str) -> None:
    """Tell a misspelt alias from one that lacks something."""
    if alias == DEFAULT_ALIAS or any(name.startswith(prefix) for name in _variables()):
        return
    known = {*_definitions, DEFAULT_ALIAS}
    raise ConfigurationError(
        f"there is no channel layer {alias!r}{did_you_mean(alias, known)}: no dictionary has it, "
        f"and no variable begins with {prefix}; to have one, set {prefix}DATABASE_URL"
    )


# Reading


def _read(settings: Mapping[str, Any]) -> dict[str, _Definition]:
    if not isinstance(settings, Mapping):
        raise ConfigurationError(
            f"settings must be a dictionary of layers, not {type(settings).__name__}; "
            "an alias alone is given as alias=…, a URL in the dictionary or the environment"
        )
    definitions = {}
    for alias, entry in settings.items():
        env_prefix(alias)
        definitions[alias] = _read_entry(f"channel layer {alias!r}", entry)
    return definitions


def _read_entry(where: str, entry: object) -> _Definition:
    if not isinstance(entry, Mapping):
        raise ConfigurationError(
            f"{where}: expected {{'BACKEND': …, 'CONFIG': {{…}}}}, not {type(entry).__name__}"
        )
    for key in entry:
        if key not in ("BACKEND", "CONFIG"):
            hint = did_you_mean(str(key).upper(), ("BACKEND", "CONFIG"))
            raise ConfigurationError(f"{where}: {key!r} is neither BACKEND nor CONFIG{hint}")
    backend, config = entry.get("BACKEND"), entry.get("CONFIG", {})
    if backend is not None and not isinstance(backend, str):
        raise ConfigurationError(f"{where}: BACKEND{shown_value(backend)}: expected a text")
    if not isinstance(config, Mapping):
        raise ConfigurationError(
            f"{where}: CONFIG must be a dictionary, not {type(config).__name__}"
        )
    lowered: dict[str, Any] = {}
    for name, value in config.items():
        if not isinstance(name, str):
            raise ConfigurationError(f"{where}: CONFIG has {name!r}, which is no setting")
        if name.lower() in lowered:
            raise ConfigurationError(f"{where}: CONFIG has {name.lower()} twice")
        lowered[name.lower()] = value
    return _Definition(backend, lowered)


# Making


def _make(alias: str, definition: _Definition) -> ChannelLayer:
    _check_variables(alias)
    try:
        config = dict(definition.config)
        choices = _choose(alias, definition.backend, config.pop("serializer", None))
        settings = Settings.for_alias(alias, **_without_reserved(config))
        if choices.backend == "postgres":
            # An application learns at its start that there is no database, not when it opens.
            settings.dsn  # noqa: B018
        backend = _find_backend(choices.backend, f"BACKEND ({env_prefix(alias)}BACKEND)")
        if choices.serializer is None:
            return backend(settings)
        serializer = _find_serializer(
            choices.serializer, f"serializer ({env_prefix(alias)}SERIALIZER)"
        )
        return backend(settings, serializer=serializer)
    except ConfigurationError as error:
        raise ConfigurationError(f"channel layer {alias!r}: {error}") from error


def _without_reserved(config: dict[str, Any]) -> dict[str, Any]:
    # pydantic-settings takes arguments of its own with a leading underscore.
    if reserved := sorted(name for name in config if name.startswith("_")):
        raise ConfigurationError(f"there is no setting {', '.join(reserved)}")
    return config


def _choose(alias: str, backend: str | None, serializer: object) -> _Choices:
    prefix = env_prefix(alias)
    given: dict[str, Any] = {"_env_prefix": prefix}
    if backend is not None:
        given["backend"] = backend
    if serializer is not None:
        given["serializer"] = serializer
    return _Choices(**given)


def _find_backend(path: str, what: str) -> type[ChannelLayer]:
    if path not in BACKENDS and not _PATH.fullmatch(path):
        raise ConfigurationError(
            f"{what}{shown_value(path)}: expected {', '.join(BACKENDS)} or a dotted path"
            f"{did_you_mean(path, BACKENDS)}"
        )
    found = _find(BACKENDS.get(path, path), what)
    if not isinstance(found, type) or not issubclass(found, ChannelLayer):
        raise ConfigurationError(f"{what} is {path!r}, which is no subclass of ChannelLayer")
    if isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigurationError(f"{what} is {path!r}, which does not implement {missing}")
    return found


def _find_serializer(given: object, what: str) -> Serializer:
    found: Any = given
    if isinstance(given, str):
        if not _PATH.fullmatch(given):
            raise ConfigurationError(f"{what}{shown_value(given)}: expected a dotted path")
        found = _find(given, what)
    if isinstance(found, type):
        found = found()
    if not callable(getattr(found, "dumps", None)) or not callable(getattr(found, "loads", None)):
        raise ConfigurationError(f"{what}{shown_value(given)}, but must have dumps() and loads()")
    serializer: Serializer = found
    return serializer


def _find(path: str, what: str) -> Any:
    """Import ``package.module:name`` or ``package.module.name``."""
    separator = ":" if ":" in path else "."
    module, _, name = path.rpartition(separator)
    try:
        return attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{what} is {path!r}, which cannot be had: {error}") from error


# Variables that nobody reads


def _variables() -> set[str]:
    """The names of all variables of ours in the environment and in ``.env``, in upper case."""
    sources = (EnvSettingsSource(Settings), DotEnvSettingsSource(Settings))
    names = {name.upper() for source in sources for name in source.env_vars}
    return {name for name in names if name.startswith(env_prefix(DEFAULT_ALIAS))}


def _check_variables(alias: str) -> None:
    """Tell of variables that look as if they were meant for a layer, and that nothing reads.

    Those with the alias in them can only be meant for it, and are refused. Others may be another
    program's, or a later version's: they are logged.
    """
    prefix = env_prefix(alias)
    known = [name.upper() for name in (*Settings.model_fields, *_Choices.model_fields)]
    unread = sorted(_variables().difference(prefix + name for name in known))
    # The default alias has no such variables, but who writes one means it.
    own = f"PGCHANNELS__{alias.upper()}__"
    if meant := [name for name in unread if name.startswith(own)]:
        raise ConfigurationError(
            f"channel layer {alias!r}: nothing reads "
            + ", ".join(n + did_you_mean(n.removeprefix(own), known, prefix) for n in meant)
        )
    if alias == DEFAULT_ALIAS:
        for name in unread:
            if not _OTHERS.fullmatch(name):
                hint = did_you_mean(name.removeprefix(prefix), known, prefix)
                logger.warning("nothing reads %s%s", name, hint)
