"""A real Postgres for every test: one server a session, one database a test, cloned from a migrated template.

PGHARNESS_TEST_DATABASE_URL names a server to use (its role needs CREATEDB); otherwise a private embedded server is
started, with the binaries of PGHARNESS_PG_BIN when that is set: this is how the suite runs on several majors.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.conninfo import make_conninfo

from pgharness import schema
from pgharness.embedded import EmbeddedPostgres, temporary_root


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """Connection string of a server on which databases may be created."""
    given = os.environ.get("PGHARNESS_TEST_DATABASE_URL")
    if given:
        yield given
        return
    root = temporary_root()
    server = EmbeddedPostgres(root, durable=False)
    try:
        yield server.ensure()
    finally:
        server.close()
        shutil.rmtree(root, ignore_errors=True)


def _admin(url: str, statement: str) -> None:
    with psycopg.connect(make_conninfo(url, dbname="postgres"), autocommit=True) as connection:
        connection.execute(statement.encode())


@pytest.fixture(scope="session")
def template(server_url: str) -> Iterator[str]:
    """Name of a migrated database to clone."""
    name = f"pgharness_test_{uuid.uuid4().hex[:12]}_template"
    _admin(server_url, f"create database {name}")
    with psycopg.connect(make_conninfo(server_url, dbname=name), autocommit=True) as connection:
        schema.upgrade(connection)
    yield name
    if "PGHARNESS_TEST_DATABASE_URL" in os.environ:  # a server of our own goes away with all that is on it
        _admin(server_url, f"drop database if exists {name} with (force)")


@pytest.fixture
def empty_url(server_url: str) -> Iterator[str]:
    """Connection string of a new, empty database."""
    name = f"pgharness_test_{uuid.uuid4().hex[:12]}"
    _admin(server_url, f"create database {name}")
    yield make_conninfo(server_url, dbname=name)
    _admin(server_url, f"drop database if exists {name} with (force)")


@pytest.fixture
def url(server_url: str, template: str) -> Iterator[str]:
    """Connection string of a new database with the schema installed."""
    name = f"pgharness_test_{uuid.uuid4().hex[:12]}"
    _admin(server_url, f"create database {name} template {template}")
    yield make_conninfo(server_url, dbname=name)
    _admin(server_url, f"drop database if exists {name} with (force)")


@pytest.fixture
def db(url: str) -> Iterator[Connection[Any]]:
    """A connection to a new database with the schema installed; not autocommit."""
    with psycopg.connect(url) as connection:
        yield connection
        connection.rollback()
