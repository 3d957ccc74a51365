"""Installing and upgrading the schema: numbered migrations once, functions, views and grants at every migrate.

One transaction under an advisory lock: racing installers queue up, and a failure leaves the database as it was. Every
applied migration is in `pgharness.schema_migrations` with the checksum of its text; an edited one is refused. The
queue's own schema is installed the same way, with its functions' search_path pinned.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import psycopg
from psycopg import Connection

from pgharness.database import translated_errors
from pgharness.errors import SchemaOutOfDate

_LOCK = "select pg_advisory_xact_lock(hashtextextended('pgharness.migrate', 0))"
_BOOTSTRAP = """
create schema if not exists pgharness;
comment on schema pgharness is 'LLM experiments: tables to insert into, functions to call, views to read.';
create table if not exists pgharness.schema_migrations (
    name       text not null,
    checksum   text not null,
    applied_at timestamptz not null default now(),
    constraint schema_migrations_pkey primary key (name)
);
comment on table pgharness.schema_migrations is 'One row per applied migration, with the SHA-256 of its text.';
"""
_RECORD = """
insert into pgharness.schema_migrations (name, checksum) values (%s, %s)
on conflict on constraint schema_migrations_pkey do update set checksum = excluded.checksum, applied_at = now()
"""
# the queue can be dropped and made again: what is in it can be found again in our rows
_QUEUE_IS_LOST = "to_regclass('procrastinate.procrastinate_jobs') is null"
# the queue names its tables unqualified: pin the path of its functions, so that any session may fire its triggers
_PIN_QUEUE = """
do $pin$
declare
    v_function regprocedure;
begin
    for v_function in
        select p.oid::regprocedure from pg_proc as p where p.pronamespace = 'procrastinate'::regnamespace
    loop
        execute format('alter function %s set search_path = procrastinate, pg_temp', v_function);
    end loop;
end;
$pin$;
"""


@dataclass(frozen=True, slots=True)
class Script:
    """One SQL file: its name in the ledger and its text."""

    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def packaged(folder: str) -> Path:
    """Return a top-level folder of the project: inside the installed package, else in the checkout."""
    installed = Path(str(resources.files("pgharness"))) / f"_{folder}"
    return installed if installed.is_dir() else Path(__file__).parents[2] / folder


def _scripts(folder: str) -> list[Script]:
    return [
        Script(path.name, path.read_text(encoding="utf-8")) for path in sorted((packaged("sql") / folder).glob("*.sql"))
    ]


def migrations() -> list[Script]:
    """Return the queue's schema, under the release that it is of, and our numbered migrations, in order."""
    queue = Path(str(resources.files("procrastinate"))) / "sql"
    text = "create schema if not exists procrastinate;\nset local search_path = procrastinate;\n"
    text += (queue / "schema.sql").read_text(encoding="utf-8") + _PIN_QUEUE + "set local search_path to default;\n"
    text += "comment on schema procrastinate is 'The job queue of pgharness: transport only, it can be rebuilt.';\n"
    version = ".".join(metadata.version("procrastinate").split(".")[:2])
    return [Script(f"procrastinate/{version}", text), *_scripts("migrations")]


def repeatables() -> list[Script]:
    """Return what every migrate applies whole: functions, views, grants."""
    grants = packaged("sql") / "grants.sql"
    return [*_scripts("functions"), *_scripts("views"), Script(grants.name, grants.read_text(encoding="utf-8"))]


def _applied(connection: Connection[Any]) -> dict[str, str]:
    applied = dict(connection.execute("select name, checksum from pgharness.schema_migrations").fetchall())
    if connection.execute(f"select {_QUEUE_IS_LOST}").fetchone() == (True,):
        return {name: checksum for name, checksum in applied.items() if not name.startswith("procrastinate/")}
    return applied


def _pending(applied: dict[str, str]) -> list[Script]:
    known = migrations()
    for script in known:
        if applied.get(script.name, script.checksum) != script.checksum and not script.name.startswith(
            "procrastinate/"
        ):
            raise SchemaOutOfDate(
                f"migration {script.name} was applied with another text than this version has",
                hint="Migrations are never edited: install the pgharness that made this database, or a later one.",
            )
    unknown = sorted(name for name in applied.keys() - {script.name for script in known} if "/" not in name)
    if unknown:
        raise SchemaOutOfDate(
            f"the database was migrated by a newer pgharness (it has {unknown[-1]})",
            hint="Upgrade this installation: pip install --upgrade pgharness.",
        )
    return [script for script in known if script.name not in applied]


def _run(connection: Connection[Any], text: str) -> None:
    connection.execute(text.encode())


def upgrade(connection: Connection[Any]) -> list[str]:
    """Bring the database to this version, wholly or not at all; return the names of the migrations applied.

    Idempotent and safe for racing installers. Raises SchemaOutOfDate when the ledger does not fit this version, and
    DatabaseError with the server's words when a statement fails.
    """
    with translated_errors(), connection.transaction():
        connection.execute(_LOCK)
        _run(
            connection,
            "set local lock_timeout = '5s'; set local check_function_bodies = off;"
            "set local client_min_messages = warning;",
        )
        _run(connection, _BOOTSTRAP)
        pending = _pending(_applied(connection))
        for script in pending:
            _run(connection, script.text)
            connection.execute(_RECORD, (script.name, script.checksum))
        for script in repeatables():
            _run(connection, script.text)
        return [script.name for script in pending]


def verify(connection: Connection[Any]) -> None:
    """Raise SchemaOutOfDate unless the database is at exactly this version's migrations."""
    hint = "Run `pgharness migrate`."
    try:
        pending = _pending(_applied(connection))
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        raise SchemaOutOfDate("schema pgharness is not installed in this database", hint=hint) from None
    except psycopg.errors.InsufficientPrivilege as exc:
        raise SchemaOutOfDate(
            f"this role may not use schema pgharness ({exc.diag.message_primary})",
            hint="Ask its owner: grant pgharness_author to your_role; (or pgharness_reader, pgharness_worker).",
        ) from None
    if pending:
        raise SchemaOutOfDate(f"the database lacks migration {pending[0].name}", hint=hint)


def bundle() -> str:
    """Return plain SQL that does what upgrade does, for people who migrate with their own tool.

    It can be applied to an empty database or to one of an earlier version, any number of times.
    """
    parts = [
        "-- pgharness schema: apply in one transaction, for example with psql -1 -v ON_ERROR_STOP=1 -f FILE",
        _LOCK + ";",
        "set local check_function_bodies = off;",
        _BOOTSTRAP,
    ]
    for script in migrations():
        tag = f"$migration_{script.checksum[:8]}$"
        known = f"exists (select from pgharness.schema_migrations where name = '{script.name}')"
        if script.name.startswith("procrastinate/"):
            known = f"{known} and not {_QUEUE_IS_LOST}"
        record = _RECORD.strip() % (f"'{script.name}'", f"'{script.checksum}'")
        parts.append(
            f"do $bundle$\nbegin\n    if not ({known}) then\n        execute {tag}\n{script.text}\n{tag};\n"
            f"        {record};\n    end if;\nend;\n$bundle$;"
        )
    parts += [f"-- {script.name}\n{script.text}" for script in repeatables()]
    return "\n".join(parts) + "\n"
