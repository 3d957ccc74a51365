"""Settings: a flag, else an environment variable, else a default; an unknown PGHARNESS_ variable is an error."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pgharness.errors import SettingsError

LISTEN_OFF = "off"
VARIABLES: dict[str, str] = {
    "PGHARNESS_DATABASE_URL": "connection string of the server to use; without it the embedded server is used",
    "PGHARNESS_LISTEN_URL": "direct connection string for workers to hear of new work, when PGHARNESS_DATABASE_URL is a"
    " pooler's in transaction mode; `off` lets them ask once a second instead",
    "PGHARNESS_HOME": "folder of the embedded server's data",
    "PGHARNESS_PG_BIN": "folder with the Postgres programs for the embedded server",
    "PGHARNESS_OS_USER": "operating-system user that runs the embedded server when pgharness runs as root",
    "PGHARNESS_CACHE": "folder for worktrees of command models",
    "PGHARNESS_ALLOW_CODE": "1 lets workers run command and python models",
    "PGHARNESS_EXPERIMENTS": "folders and modules with code experiments, separated as in PATH; without it those that"
    " the project's .pgharness names, or ./experiments",
    "PGHARNESS_STALE_SECONDS": "seconds without a heartbeat after which a worker counts as lost (default 30)",
    "PGHARNESS_PLUGIN_SECONDS": "seconds that importing a plugin may take before it counts as broken (default 30)",
    "PGHARNESS_TEST_DATABASE_URL": "server for the test suite",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a process needs to know before it can reach the database."""

    database_url: str | None
    cache_root: Path
    allows_code: bool
    stale_seconds: float
    listen_url: str | None  # None: over the database URL, unless a pooler forbids it
    experiments: tuple[str, ...] = ()  # folders and modules; none: those of the project
    plugin_seconds: float = 30.0

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, *, database_url: str | None = None) -> Settings:
        """Read the environment. Raises SettingsError naming the variable and what it may be."""
        for name in environ:
            if name.startswith("PGHARNESS_") and name not in VARIABLES:
                known = {variable.removeprefix("PGHARNESS_"): variable for variable in VARIABLES}
                close = get_close_matches(name.removeprefix("PGHARNESS_"), known, n=1)
                raise SettingsError(
                    f"environment variable {name} is unknown",
                    hint=f"Did you mean {known[close[0]]}?" if close else f"Known: {', '.join(VARIABLES)}.",
                )
        return cls(
            database_url=database_url or environ.get("PGHARNESS_DATABASE_URL") or None,
            cache_root=Path(environ.get("PGHARNESS_CACHE") or _default_cache(environ)),
            allows_code=_flag(environ, "PGHARNESS_ALLOW_CODE"),
            stale_seconds=_seconds(environ, "PGHARNESS_STALE_SECONDS", 30.0),
            listen_url=_listen_url(environ),
            experiments=tuple(filter(None, environ.get("PGHARNESS_EXPERIMENTS", "").split(os.pathsep))),
            plugin_seconds=_seconds(environ, "PGHARNESS_PLUGIN_SECONDS", 30.0),
        )


def _default_cache(environ: Mapping[str, str]) -> Path:
    if base := environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pgharness"
    if home := environ.get("HOME"):
        return Path(home) / ".cache" / "pgharness"
    return Path(tempfile.gettempdir()) / f"pgharness-cache-{os.getuid()}"


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").lower()
    if value not in ("", "0", "1", "true", "false", "yes", "no"):
        raise SettingsError(f"{name} is {value!r}", hint=f"Set {name}=1 or {name}=0.")
    return value in ("1", "true", "yes")


def _listen_url(environ: Mapping[str, str]) -> str | None:
    value = environ.get("PGHARNESS_LISTEN_URL") or None
    if value is None or value.lower() == LISTEN_OFF:
        return value and LISTEN_OFF
    if "=" not in value and "://" not in value:
        raise SettingsError(
            "PGHARNESS_LISTEN_URL is no connection string",  # which is not shown: it may hold a password
            hint="Set it to a direct connection string of the database, such as postgresql://host/name, or to off.",
        )
    return value


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 1 <= value <= 3600:
        raise SettingsError(f"{name} is {text!r}", hint=f"Set {name} to a number of seconds between 1 and 3600.")
    return value
