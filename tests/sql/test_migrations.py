"""Installing and upgrading: wholly or not at all, once, by whoever comes first, and also without pgharness itself."""

from __future__ import annotations

import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.conninfo import make_conninfo

from pgharness import schema
from pgharness.errors import DatabaseError, SchemaOutOfDate
from pgharness.schema import Script
from world import add_instance, contents, orphans, register, run_of, start, value, work_off

Database = Connection[Any]

_CATALOG = """
with ours as (select oid from pg_namespace where nspname in ('pgharness', 'procrastinate'))
select 'schema ' || n.nspname || coalesce(obj_description(n.oid), '') || acl.text
  from pg_namespace as n, lateral (select array(select a::text from unnest(n.nspacl) as a order by 1)::text as text) as acl where n.oid in (select oid from ours)
union all
select format('relation %s %s %s %s %s', c.oid::regclass, c.relkind, c.reloptions, obj_description(c.oid, 'pg_class'), acl.text)
  from pg_class as c, lateral (select array(select a::text from unnest(c.relacl) as a order by 1)::text as text) as acl where c.relnamespace in (select oid from ours)
union all
select format('column %s.%s %s %s %s %s %s %s %s', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
              a.attgenerated, pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum), a.attacl)
  from pg_attribute as a join pg_class as c on c.oid = a.attrelid left join pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
 where c.relnamespace in (select oid from ours) and a.attnum > 0
union all
select format('constraint %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid)) from pg_constraint where connamespace in (select oid from ours)
union all
select pg_get_indexdef(i.indexrelid) from pg_index as i join pg_class as c on c.oid = i.indexrelid where c.relnamespace in (select oid from ours)
union all
select format('%s %s %s', pg_get_functiondef(p.oid), obj_description(p.oid, 'pg_proc'), acl.text)
  from pg_proc as p, lateral (select array(select a::text from unnest(p.proacl) as a order by 1)::text as text) as acl where p.pronamespace in (select oid from ours)
union all
select pg_get_triggerdef(t.oid) from pg_trigger as t join pg_class as c on c.oid = t.tgrelid where c.relnamespace in (select oid from ours) and not t.tgisinternal
union all
select format('view %s %s', c.oid::regclass, pg_get_viewdef(c.oid)) from pg_class as c where c.relnamespace in (select oid from ours) and c.relkind = 'v'
union all
select format('type %s %s %s', t.oid::regtype, obj_description(t.oid, 'pg_type'), (select string_agg(e.enumlabel, ',' order by e.enumsortorder) from pg_enum as e where e.enumtypid = t.oid))
  from pg_type as t where t.typnamespace in (select oid from ours)
"""


def catalog(db: Database) -> list[str]:
    """Return everything that is defined in our schemas, as sorted text."""
    return sorted(text for (text,) in db.execute(_CATALOG.encode()).fetchall())


def ledger(db: Database) -> dict[str, str]:
    return dict(db.execute("select name, checksum from pgharness.schema_migrations").fetchall())


def connect(url: str) -> Database:
    return psycopg.connect(url, autocommit=True)


@pytest.fixture
def empty(empty_url: str) -> Iterator[Database]:
    """A connection to a new, empty database."""
    with connect(empty_url) as connection:
        yield connection


@pytest.fixture
def installed(shared_url: str) -> Iterator[Database]:
    """A connection to an installed database, which the test leaves as it was."""
    with connect(shared_url) as connection:
        yield connection


def test_a_fresh_install_is_complete_and_a_second_one_changes_nothing(empty: Database) -> None:
    with pytest.raises(SchemaOutOfDate, match="not installed") as caught:
        schema.verify(empty)
    assert "pgharness migrate" in (caught.value.hint or "")
    names = [script.name for script in schema.migrations()]
    assert schema.upgrade(empty) == names
    schema.verify(empty)
    assert ledger(empty) == {script.name: script.checksum for script in schema.migrations()}
    before, rows_before = catalog(empty), contents(empty)
    assert schema.upgrade(empty) == []
    assert catalog(empty) == before and contents(empty) == rows_before
    assert empty.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_an_upgrade_applies_what_is_new_and_keeps_what_people_have(
    empty: Database, installed: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = schema.migrations()
    late = Script("9000_later.sql", "create table pgharness.later (id bigint);")
    schema.upgrade(empty)
    add_instance(empty)
    run = start(empty)
    before = contents(empty)
    monkeypatch.setattr(schema, "migrations", lambda: [*everything, late])
    with pytest.raises(SchemaOutOfDate, match=r"lacks migration 9000_later\.sql"):
        schema.verify(empty)
    assert schema.upgrade(empty) == ["9000_later.sql"]
    schema.verify(empty)
    after = contents(empty)
    assert {table for table in after if before.get(table) != after[table]} == {
        "pgharness.later",
        "pgharness.schema_migrations",
    }
    work_off(empty, register(empty))
    assert run_of(empty, run)["status"] == "completed"
    assert orphans(empty) == []
    empty.execute("drop table pgharness.later; delete from pgharness.schema_migrations where name = '9000_later.sql'")
    assert catalog(empty) == catalog(installed)


def test_eight_installers_at_once_all_succeed(empty_url: str) -> None:
    barrier = threading.Barrier(8)

    def install(_: int) -> list[str]:
        with connect(empty_url) as mine:
            barrier.wait(20)
            return schema.upgrade(mine)

    with ThreadPoolExecutor(8) as pool:
        applied = list(pool.map(install, range(8)))
    assert sorted(applied) == [[]] * 7 + [[script.name for script in schema.migrations()]]
    with connect(empty_url) as db:
        schema.verify(db)


def test_installers_in_several_databases_of_one_server_may_make_the_roles_at_once(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"pgharness_test_{uuid.uuid4().hex[:8]}"
    # each of two thinks that it is the first: the roles of the other are not committed yet
    grants = (
        schema.repeatables()[-1]
        .text.replace("pgharness_", f"{prefix}_")
        .replace(f"schema {prefix}_", "schema pgharness_")
    )
    creating = grants[grants.index("do $$") : grants.index("    grant usage")] + "end;\n$$;"
    with psycopg.connect(server_url) as first, psycopg.connect(server_url) as second, connect(server_url) as watcher:
        if not value(watcher, "select rolsuper or rolcreaterole from pg_roles where rolname = current_user"):
            pytest.skip("this role may not create roles")
        try:
            first.execute(creating.encode())
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(second.execute, creating.encode())
                while not value(watcher, "select cardinality(pg_blocking_pids(%s)) > 0", second.info.backend_pid):
                    assert not other.done()
                    threading.Event().wait(0.002)
                first.commit()
                other.result(10)
                second.commit()
            assert value(watcher, "select count(*) from pg_roles where rolname like %s", f"{prefix}%") == 3
        finally:
            first.rollback()
            second.rollback()
            for role in ("reader", "author", "worker"):
                watcher.execute(f"drop role if exists {prefix}_{role}".encode())


# -- refusals


def test_an_edited_migration_and_a_newer_database_are_refused(installed: Database) -> None:
    before = catalog(installed)
    for change, text, hint in (
        (
            "update pgharness.schema_migrations set checksum = 'other' where name = '0001_inputs.sql'",
            r"0001_inputs\.sql was applied with another text",
            "Migrations are never edited",
        ),
        (
            "insert into pgharness.schema_migrations (name, checksum) values ('9999_future.sql', 'x')",
            r"newer pgharness \(it has 9999_future\.sql\)",
            "Upgrade this installation",
        ),
    ):
        with installed.transaction(force_rollback=True):
            installed.execute(change.encode())
            for action in (schema.upgrade, schema.verify):
                with pytest.raises(SchemaOutOfDate, match=text) as caught:
                    action(installed)
                assert hint in (caught.value.hint or "")
    assert catalog(installed) == before


@pytest.mark.parametrize("where", ["migration", "function"])
def test_a_failing_script_leaves_nothing_behind(empty: Database, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    broken = Script("9000_broken.sql", "create table pgharness.half (id bigint); select 1 / 0;")
    migrations, repeatables = schema.migrations(), schema.repeatables()
    if where == "migration":
        monkeypatch.setattr(schema, "migrations", lambda: [*migrations, broken])
    else:
        monkeypatch.setattr(schema, "repeatables", lambda: [broken, *repeatables])
    with pytest.raises(DatabaseError, match="division by zero") as caught:
        schema.upgrade(empty)
    assert caught.value.sqlstate == "22012"
    assert value(empty, "select count(*) from pg_namespace where nspname in ('pgharness', 'procrastinate')") == 0
    assert empty.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    monkeypatch.undo()
    schema.upgrade(empty)
    before, rows_before = catalog(empty), contents(empty)
    monkeypatch.setattr(schema, "migrations", lambda: [*migrations, broken])
    with pytest.raises(DatabaseError, match="division by zero"):
        schema.upgrade(empty)
    assert catalog(empty) == before and contents(empty) == rows_before


# -- without pgharness


def apply(url: str, script: str, folder: Path) -> None:
    """Apply plain SQL in one transaction: with psql where there is one, else as psql would send it."""
    if psql := shutil.which("psql"):
        file = folder / "bundle.sql"
        file.write_text(script)
        done = subprocess.run(
            [psql, "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-f", str(file), url],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return
    with psycopg.connect(url) as db:
        db.execute(script.encode())


def test_the_bundle_makes_what_an_upgrade_makes_and_may_be_applied_again(
    empty_url: str, installed: Database, tmp_path: Path
) -> None:
    script = schema.bundle()
    apply(empty_url, script, tmp_path)
    with connect(empty_url) as db:
        schema.verify(db)
        assert catalog(db) == catalog(installed)
        assert ledger(db) == ledger(installed)
        add_instance(db)
        run = start(db)
        before = contents(db)
        apply(empty_url, script, tmp_path)
        assert contents(db) == before
        assert catalog(db) == catalog(installed)
        assert schema.upgrade(db) == []
        work_off(db, register(db))
        assert run_of(db, run)["status"] == "completed"


# -- ordinary roles


@pytest.fixture
def owner(server_url: str) -> Iterator[str]:
    """A login that is no superuser and may not create roles."""
    name = f"pgharness_test_{uuid.uuid4().hex[:8]}"
    with connect(server_url) as admin:
        if not value(admin, "select rolsuper from pg_roles where rolname = current_user"):
            pytest.skip("only a superuser can make databases for others")
        admin.execute(f"create role {name} login".encode())
        yield name
        admin.execute(f"drop role {name}".encode())


@pytest.fixture
def owned(server_url: str, owner: str) -> Iterator[tuple[Database, list[str]]]:
    """A connection that acts as that role, in a database of its own, and the warnings that it is sent."""
    name = f"pgharness_test_{uuid.uuid4().hex[:12]}"
    with connect(make_conninfo(server_url, dbname="postgres")) as admin:
        admin.execute(f"create database {name} owner {owner}".encode())
        try:
            with connect(make_conninfo(server_url, dbname=name)) as db:
                heard: list[str] = []
                db.add_notice_handler(lambda notice: heard.append(notice.message_primary or ""))
                db.execute(f"set role {owner}".encode())
                yield db, heard
        finally:
            admin.execute(f"drop database {name} with (force)".encode())


def test_an_owner_who_may_not_create_roles_uses_those_that_exist(
    owned: tuple[Database, list[str]], template: str
) -> None:
    db, heard = owned
    schema.upgrade(db)
    schema.verify(db)
    assert heard == []
    assert value(db, "select has_schema_privilege('pgharness_reader', 'pgharness', 'usage')")
    assert value(db, "select has_table_privilege('pgharness_author', 'pgharness.instances', 'insert')")
    add_instance(db)
    run = start(db)
    work_off(db, register(db))
    assert run_of(db, run)["status"] == "completed"


def test_without_the_roles_and_the_right_to_create_them_the_owner_alone_uses_it(
    owned: tuple[Database, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    db, heard = owned
    *others, grants = schema.repeatables()
    unheard = grants.text
    for role in ("reader", "author", "worker"):
        unheard = unheard.replace(f"pgharness_{role}", f"pgharness_test_no_{role}")
    monkeypatch.setattr(schema, "repeatables", lambda: [*others, Script(grants.name, unheard)])
    assert schema.upgrade(db) == [script.name for script in schema.migrations()]
    assert (
        len(heard) == 1
        and "roles were not set up" in heard[0]
        and "only the owner of schema pgharness can use it" in heard[0]
    )
    assert not value(db, "select has_schema_privilege('pgharness_reader', 'pgharness', 'usage')")
    add_instance(db)
    run = start(db)
    work_off(db, register(db))
    assert run_of(db, run)["status"] == "completed"
    monkeypatch.undo()
    schema.upgrade(db)
    assert value(db, "select has_schema_privilege('pgharness_reader', 'pgharness', 'usage')")


def test_a_role_without_any_right_is_told_whom_to_ask(shared_url: str, owner: str) -> None:
    with connect(shared_url) as db:
        db.execute(f"set role {owner}".encode())
        with pytest.raises(SchemaOutOfDate, match="may not use schema pgharness") as caught:
            schema.verify(db)
        assert "grant pgharness_author to" in (caught.value.hint or "")
        with pytest.raises(DatabaseError) as refusal:
            schema.upgrade(db)
        assert refusal.value.sqlstate == "42501"
