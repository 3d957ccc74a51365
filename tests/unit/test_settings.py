"""Settings: a flag beats a variable, a variable beats a default, and a misspelt one is no default."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgharness.errors import SettingsError
from pgharness.settings import VARIABLES, Settings

HOME = {"HOME": "/nonexistent"}


def test_without_anything_the_embedded_server_is_used_and_no_code_is_run() -> None:
    settings = Settings.from_env(HOME)
    assert settings == Settings(
        database_url=None,
        cache_root=Path("/nonexistent/.cache/pgharness"),
        allows_code=False,
        stale_seconds=30,
        listen_url=None,
    )


def test_a_flag_beats_the_environment() -> None:
    environment = {"PGHARNESS_DATABASE_URL": "postgresql://variable/x"}
    assert Settings.from_env(environment).database_url == "postgresql://variable/x"
    flagged = Settings.from_env(environment, database_url="postgresql://flag/x")
    assert flagged.database_url == "postgresql://flag/x"


def test_empty_variables_count_as_unset() -> None:
    empty = {name: "" for name in VARIABLES}
    assert Settings.from_env(HOME | empty) == Settings.from_env(HOME)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        (HOME | {"PGHARNESS_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        (HOME | {"XDG_CACHE_HOME": "/b"}, "/b/pgharness"),
        (HOME, "/nonexistent/.cache/pgharness"),
    ],
)
def test_the_cache_lies_where_it_is_told_to_or_where_caches_lie(environment: dict[str, str], folder: str) -> None:
    assert Settings.from_env(environment).cache_root == Path(folder)


def test_a_process_without_a_home_has_a_cache_of_its_own() -> None:
    assert Settings.from_env({}).cache_root.name.startswith("pgharness-cache-")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", True), ("true", True), ("YES", True), ("0", False), ("False", False), ("no", False), ("", False)],
)
def test_flags_are_read_as_people_write_them(value: str, expected: bool) -> None:
    assert Settings.from_env(HOME | {"PGHARNESS_ALLOW_CODE": value}).allows_code is expected


@pytest.mark.parametrize("value", ["1", "2.5", "3600"])
def test_seconds_are_numbers(value: str) -> None:
    assert Settings.from_env(HOME | {"PGHARNESS_STALE_SECONDS": value}).stale_seconds == float(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", None),
        ("off", "off"),
        ("OFF", "off"),
        ("postgresql://direct/x", "postgresql://direct/x"),
        ("host=direct dbname=x", "host=direct dbname=x"),
    ],
)
def test_new_work_is_heard_of_where_it_is_told_or_not_at_all(value: str, expected: str | None) -> None:
    assert Settings.from_env(HOME | {"PGHARNESS_LISTEN_URL": value}).listen_url == expected


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("PGHARNESS_LISTEN_URL", "of", "or to off"),
        ("PGHARNESS_ALLOW_CODE", "maybe", "PGHARNESS_ALLOW_CODE=1"),
        ("PGHARNESS_STALE_SECONDS", "soon", "between 1 and 3600"),
        ("PGHARNESS_STALE_SECONDS", "0", "between 1 and 3600"),
        ("PGHARNESS_STALE_SECONDS", "nan", "between 1 and 3600"),
        ("PGHARNESS_STALE_SECONDS", "inf", "between 1 and 3600"),
        ("PGHARNESS_DATABASE_ULR", "x", "Did you mean PGHARNESS_DATABASE_URL?"),
        ("PGHARNESS_FLUX_CAPACITOR", "", "PGHARNESS_HOME"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named_with_the_remedy(name: str, value: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(HOME | {name: value})
    assert name in str(caught.value)
    assert caught.value.hint is not None and hint in caught.value.hint


def test_other_peoples_variables_are_left_alone() -> None:
    assert Settings.from_env(HOME | {"PGHOST": "x", "MY_PGHARNESS_THING": "x"}) == Settings.from_env(HOME)


def test_every_variable_says_what_it_is_for() -> None:
    assert all(name.startswith("PGHARNESS_") and text for name, text in VARIABLES.items())
