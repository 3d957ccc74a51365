"""One database and one connection a module for tests that roll back: making them anew would cost more than the tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import Connection

import world


@pytest.fixture(scope="module")
def shared_url(server_url: str, template: str) -> Iterator[str]:
    """Connection string of a database that the tests of a module share; what they commit stays."""
    with world.cloned(server_url, template) as url:
        yield url


@pytest.fixture(scope="module")
def shared_connection(shared_url: str) -> Iterator[Connection[Any]]:
    """A connection to it, whose functions are compiled and whose catalog is cached."""
    with psycopg.connect(shared_url) as connection:
        yield connection
        connection.rollback()


@pytest.fixture
def tx(shared_connection: Connection[Any]) -> Iterator[Connection[Any]]:
    """A connection in a transaction that is rolled back."""
    yield shared_connection
    shared_connection.rollback()
