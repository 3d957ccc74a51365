"""The one door to SQL: a pool, calls of pgharness functions, reads of pgharness views.

Python holds no SQL of its own beyond what is built here: everything that changes state is a function of schema
`pgharness`, everything that is read is a view of it. Errors come out as HarnessError, with the server's hint. Nothing
here leaves anything behind in a session (settings, prepared statements, locks, temporary tables), so a pooler may give
each transaction another server connection; the one exception is `listen`, which is told where to connect.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import AsyncConnection, Connection, IsolationLevel
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg.sql import SQL, Composed, Identifier, Literal, Placeholder
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool

from pgharness.errors import DatabaseError, from_sqlstate

logger = logging.getLogger(__name__)
Row = dict[str, Any]
# a worker process has these, one that records and one that listens
POOL_SIZE = 2
WORKER_CONNECTIONS = POOL_SIZE + 2
# A peer that went away without a word is noticed within half a minute, not after the hours that TCP gives it; and a
# prepared statement would not outlive the queue's schema, nor a pooler's choice of another server connection.
_CONNECTING: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "prepare_threshold": None,
}
_RECONNECT_SECONDS = 10.0  # after which a pool that tries in vain begins anew: its pauses double
_LISTENING_SECONDS = 30.0
_HEARING_SECONDS = 2.0
_COPY_HEADER, _COPY_TRAILER = 19, 2  # bytes around the rows of COPY's binary format
# what a lost connection, a restarting server or a deadlock looks like: the same statement may succeed later
_BEYOND_LIMITS = "54"  # SQLSTATE class
TRANSIENT = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.SerializationFailure)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn what the server refuses into HarnessError; connection trouble (TRANSIENT) passes through."""
    try:
        yield
    except psycopg.Error as exc:
        diag = exc.diag
        # psycopg counts what is beyond a limit of the server among troubles that pass; but it never will
        if isinstance(exc, TRANSIENT) and not (exc.sqlstate or "").startswith(_BEYOND_LIMITS):
            raise
        raise from_sqlstate(
            exc.sqlstate, diag.message_primary or str(exc), hint=diag.message_hint, detail=diag.message_detail
        ) from exc


def _call(function: str, args: Mapping[str, object]) -> tuple[Composed, dict[str, object]]:
    named = SQL(", ").join(SQL("{} => {}").format(Identifier(name), Placeholder(name)) for name in args)
    values = {name: Jsonb(value) if isinstance(value, dict) else value for name, value in args.items()}
    return SQL("select * from pgharness.{}({})").format(Identifier(function), named), values


def _select(view: str, filters: Mapping[str, object], order: str | None, limit: int | None) -> Composed:
    query = SQL("select * from pgharness.{}").format(Identifier(view))
    if filters:
        query += SQL(" where ") + SQL(" and ").join(
            SQL("{} = {}").format(Identifier(name), Placeholder(name)) for name in filters
        )
    if order:
        query += SQL(" order by {}").format(Identifier(order))
    if limit is not None:
        query += SQL(" limit {}").format(limit)
    return query


def call(connection: Connection[Any], function: str, /, **args: object) -> list[Row]:
    """Run one pgharness function with named arguments and return its rows; a dict is sent as jsonb."""
    query, values = _call(function, args)
    with translated_errors(), connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, values).fetchall()


def rows(
    connection: Connection[Any], view: str, /, *, order: str | None = None, limit: int | None = None, **filters: object
) -> list[Row]:
    """Read a pgharness view or table, filtered by equality."""
    with translated_errors(), connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_select(view, filters, order, limit), filters).fetchall()


def stream(
    connection: Connection[Any], view: str, /, *, order: str | None = None, **filters: object
) -> Iterator[tuple[list[str], Iterator[tuple[Any, ...]]]]:
    """Read a view of any size: yield its column names and an iterator of rows, once."""
    with translated_errors(), connection.transaction(), connection.cursor(name="stream") as cursor:
        cursor.itersize = 5_000
        cursor.execute(_select(view, filters, order, None), filters)
        yield [column.name for column in cursor.description or []], cursor


def relations(connection: Connection[Any], schema: str = "pgharness") -> dict[str, list[str]]:
    """Return the tables and views of a schema with their columns, by name: those that this role may read."""
    found = connection.execute(
        "select table_name, array_agg(column_name::text order by ordinal_position) "
        "from information_schema.columns where table_schema = %s group by 1 order by 1",
        (schema,),
    )
    return dict(found.fetchall())


@contextmanager
def snapshot(url: str) -> Iterator[Connection[Any]]:
    """Open a connection that sees one state of its database and can change nothing there."""
    with connect(url, autocommit=False) as connection:
        connection.read_only = True
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        yield connection


def binary_rows(connection: Connection[Any], relation: str, columns: Iterable[str], /, **filters: object) -> bytearray:
    """Read columns of a table or view whole, filtered by equality, as fast and as small as the server can send them.

    Returns the rows of COPY's binary format, in no order: for each row two bytes with the number of columns, then for
    each column four with its length and its value, all big-endian.
    """
    query = SQL("copy (select {} from pgharness.{}{}) to stdout (format binary)").format(
        SQL(", ").join(map(Identifier, columns)),
        Identifier(relation),
        SQL(" where ") * bool(filters)
        + SQL(" and ").join(SQL("{} = {}").format(Identifier(name), Literal(value)) for name, value in filters.items()),
    )
    found = bytearray()
    with translated_errors(), connection.cursor() as cursor, cursor.copy(query) as copied:
        for part in copied:
            found += part
    return found[_COPY_HEADER:-_COPY_TRAILER]


def json_rows(connection: Connection[Any], schema: str, table: str, columns: Iterable[str]) -> Iterator[str]:
    """Read a table of another system in the order of its id: a JSON text a row, never the whole table at once."""
    query = SQL("select row_to_json(t)::text from (select {} from {} order by id) as t").format(
        SQL(", ").join(map(Identifier, columns)), Identifier(schema, table)
    )
    with translated_errors(), connection.cursor(name="json_rows") as cursor:
        cursor.itersize = 1_000
        for (text,) in cursor.execute(query):
            yield text


def adopt_rows(connection: Connection[Any], table: str, names: Iterable[str], rows: str) -> int:
    """Insert a JSON array of rows as they are into some columns of a table, unchecked and unchanged by triggers.

    For a private database that is made from files: the role has to be its superuser. Rows whose key is there already
    are left out. Returns how many were inserted.
    """
    found = connection.execute(
        "select attname, attnotnull and atttypid in ('json'::regtype, 'jsonb'::regtype) from pg_attribute"
        " where attrelid = to_regclass(format('pgharness.%%I', %s::text)) and attnum > 0 and not attisdropped"
        " and attgenerated = '' and attname = any(%s)",
        (table, list(names)),
    ).fetchall()
    # a column of JSON that is never null: its null is JSON's own
    values = [SQL("coalesce(r.{}, 'null')" if is_json else "r.{}").format(Identifier(name)) for name, is_json in found]
    query = SQL(
        "insert into pgharness.{0} ({1}) overriding system value"
        " select {2} from json_populate_recordset(null::pgharness.{0}, %s::json) as r on conflict do nothing"
    ).format(Identifier(table), SQL(", ").join(Identifier(name) for name, _ in found), SQL(", ").join(values))
    with translated_errors(), connection.transaction():
        # calls refer to nothing, and their one trigger counts them in call_totals
        role = "origin" if table == "calls" else "replica"
        connection.execute(SQL("set local session_replication_role = {}").format(Identifier(role)))
        connection.execute("set local timezone = 'UTC'")
        return connection.execute(query, (rows,)).rowcount


def run_script(connection: Connection[Any], text: str) -> None:
    """Run a file of plain SQL in one transaction."""
    with translated_errors(), connection.transaction():
        connection.execute(text.encode())


def without_password(url: str) -> tuple[str, dict[str, str]]:
    """Return a connection string that others may read, and the environment that completes it for libpq's programs."""
    public = {name: str(value) for name, value in conninfo_to_dict(url).items() if value is not None}
    password = public.pop("password", None)
    return make_conninfo("", **public), {} if password is None else {"PGPASSWORD": password}


def connect(url: str, *, autocommit: bool = True) -> Connection[Any]:
    """Open one connection, for commands that end soon."""
    try:
        return psycopg.connect(url, autocommit=autocommit, application_name="pgharness", **_CONNECTING)
    except psycopg.Error as exc:
        raise _unreachable(url, exc) from exc


def _unreachable(url: str, error: psycopg.Error) -> DatabaseError:
    said = str(error).strip()
    if "@" in url or "password" in url:
        said = said.replace(url, "(the connection string)")
    return DatabaseError(
        f"cannot connect to the database: {said}",
        hint="Check that the server runs, and --database-url or PGHARNESS_DATABASE_URL; see `pgharness doctor`.",
    )


def shares_servers(url: str) -> bool:
    """Tell whether a pooler gives each transaction whatever server connection is free: transaction pooling.

    Two sessions that are open at once never meet in the same server process otherwise. That they do not meet here
    proves nothing on a busy pooler, but they take turns a few times, and a pooler prefers the connection used last.
    """
    with connect(url) as one, connect(url) as other:
        met: list[set[int]] = [set(), set()]
        for _ in range(3):
            for pids, connection in zip(met, (one, other), strict=True):
                found = connection.execute("select pg_backend_pid()").fetchone()
                assert found is not None
                pids.add(found[0])
    return bool(met[0] & met[1]) or max(map(len, met)) > 1


def connection_room(connection: Connection[Any]) -> tuple[int, int]:
    """Return how many connections the server allows to roles without privileges, and how many it has now."""
    found = connection.execute(
        "select current_setting('max_connections')::integer"
        " - current_setting('superuser_reserved_connections')::integer - coalesce("
        "current_setting('reserved_connections', true)::integer, 0),"
        " (select sum(numbackends)::integer from pg_stat_database)"
    ).fetchone()
    assert found is not None
    return found[0], found[1]


def hears(url: str, notifier: Connection[Any]) -> bool:
    """Tell whether a listener at a connection string hears what another connection notifies of."""
    token = uuid4().hex
    with connect(url) as listener, translated_errors():
        listener.execute("listen pgharness_doctor")
        notifier.execute("select pg_notify('pgharness_doctor', %s)", (token,))
        return any(heard.payload == token for heard in listener.notifies(timeout=_HEARING_SECONDS, stop_after=1))


class Database:
    """A small pool of connections for a worker: every call is one autocommitted statement.

    No transaction outlives a call, so none is held while a model is being asked.
    """

    def __init__(self, url: str, *, size: int = POOL_SIZE, application_name: str = "pgharness") -> None:
        self.url = url
        self.pool: AsyncConnectionPool[AsyncConnection[Any]] = AsyncConnectionPool(
            url,
            min_size=1,
            max_size=size,
            open=False,
            timeout=30,
            max_idle=60,
            check=None,
            reconnect_timeout=_RECONNECT_SECONDS,
            kwargs={"application_name": application_name, "autocommit": True, **_CONNECTING},
        )

    async def open(self) -> None:
        """Open the pool; raises DatabaseError when the server cannot be reached."""
        try:
            await self.pool.open(wait=True, timeout=15)
        except psycopg.Error as exc:
            await self.pool.close()
            raise DatabaseError(f"cannot connect to the database: {exc}", hint="Run `pgharness doctor`.") from exc

    async def close(self) -> None:
        await self.pool.close()

    async def call(self, function: str, /, **args: object) -> list[Row]:
        """Run one pgharness function with named arguments and return its rows; a dict is sent as jsonb."""
        return await self.call_within(None, function, **args)

    async def call_within(self, seconds: float | None, function: str, /, **args: object) -> list[Row]:
        """Do as `call`, but raise a TRANSIENT error when no connection is free in so many seconds."""
        query, values = _call(function, args)
        with translated_errors():
            async with (
                self.pool.connection(timeout=seconds) as connection,
                connection.cursor(row_factory=dict_row) as cursor,
            ):
                await cursor.execute(query, values)
                return await cursor.fetchall()

    async def persist(self, function: str, /, **args: object) -> list[Row]:
        """Do as `call`, again and again while the database is away; raise what it refuses."""
        delay = 0.1
        while True:
            try:
                return await self.call(function, **args)
            except TRANSIENT as exc:
                if self.pool.closed:
                    raise
                logger.warning("the database did not answer %s: %s", function, exc)
                await asyncio.sleep(delay * (0.5 + random.random()))
                delay = min(delay * 2, 5.0)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Database]:
        """Open on entry, close on exit."""
        await self.open()
        try:
            yield self
        finally:
            await self.close()


async def listen(url: str, channels: Iterable[str]) -> AsyncIterator[tuple[str, str]]:
    """Yield the channel and payload of each notification, over a connection of its own, until that is lost.

    Raises DatabaseError when it cannot connect or listen there.
    """
    try:
        connection = await AsyncConnection.connect(
            url, autocommit=True, application_name="pgharness listener", **_CONNECTING
        )
    except psycopg.Error as exc:
        raise _unreachable(url, exc) from exc
    async with connection:
        with translated_errors():
            for channel in channels:
                await connection.execute(SQL("listen {}").format(Identifier(channel)))
        while True:
            async for heard in connection.notifies(timeout=_LISTENING_SECONDS):
                yield heard.channel, heard.payload
            await connection.execute("select 1")  # a connection that died in silence ends here


class Ear:
    """A session that hears one channel and may hold locks, which are free again when it ends, however it ends."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection
        self._proven_at = time.monotonic()

    async def claim(self, name: str) -> bool:
        """Try to become the one session that holds the lock of a name, without waiting for it."""
        query = "select pg_try_advisory_lock(hashtextextended(%s, 0))"
        found = await (await self._connection.execute(query, (name,))).fetchone()
        return bool(found and found[0])

    async def hear(self, seconds: float) -> list[str]:
        """Return the payloads that came since it was asked last, waiting so long for one."""
        heard = [told.payload async for told in self._connection.notifies(timeout=seconds, stop_after=1)]
        heard += [told.payload async for told in self._connection.notifies(timeout=0)]
        if time.monotonic() - self._proven_at > _LISTENING_SECONDS:
            await self._connection.execute("select 1")  # a connection that died in silence ends here
            self._proven_at = time.monotonic()
        return heard


@asynccontextmanager
async def ear(url: str, channel: str) -> AsyncIterator[Ear]:
    """Open an Ear for a channel, with a connection of its own. Raises DatabaseError when it cannot connect."""
    try:
        connection = await AsyncConnection.connect(
            url, autocommit=True, application_name="pgharness hooks", **_CONNECTING
        )
    except psycopg.Error as exc:
        raise _unreachable(url, exc) from exc
    async with connection:
        with translated_errors():
            # the server, too, finds out within half a minute that this host is gone, and gives its locks to another
            for name, value in (("idle", "10"), ("interval", "5"), ("count", "3")):
                await connection.execute("select set_config(%s, %s, false)", (f"tcp_keepalives_{name}", value))
            await connection.execute(SQL("listen {}").format(Identifier(channel)))
            yield Ear(connection)


class Line:
    """One connection for a thread of its own, made when it is needed and again after it was lost."""

    def __init__(self, url: str, *, application_name: str = "pgharness") -> None:
        self._url = url
        self._application_name = application_name
        self._connection: Connection[Any] | None = None

    def call(self, function: str, /, **args: object) -> list[Row]:
        """Run one pgharness function with named arguments and return its rows; connection trouble is TRANSIENT."""
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(
                self._url, autocommit=True, application_name=self._application_name, **_CONNECTING
            )
        try:
            return call(self._connection, function, **args)
        except TRANSIENT:
            if self._connection.broken:
                self.close()
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
