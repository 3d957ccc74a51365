"""Archives in the database: what goes into a file, what may leave, what an archived run refuses, and what comes back."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from story import Story, told
from world import (
    Row,
    add_instance,
    failure,
    miscounted,
    record,
    refused,
    register,
    rows,
    run_of,
    start,
    take,
    value,
    work_off,
)

Database = Connection[Any]
COSTS = (
    "call_totals",
    "model_performance",
    "cost_by_run",
    "cost_by_model",
    "repriced_runs",
    "run_savings",
    "cost_per_correct",
)
DETACHED = ("notes", "grades", "calls", "results", "logs")
# tables about runs that hold nothing once a run is finished, follow from others, or are about archives themselves
OF_CODE = {"run_versions", "tasks", "metrics", "timings", "logged_calls", "artifacts", "progress_reports", "tellers"}
OF_BATCHES = {"batches"}
NOT_ARCHIVED = {"archives", "run_leases", "batch_items", "responses", "call_totals"}
NOT_ARCHIVED |= {"settled_scores", "settled_note_scores", "settled_pairs", "settled_spreads"}  # sums over grades


@pytest.fixture(scope="module")
def whole_story(server_url: str, template: str) -> Iterator[Story]:
    with told(server_url, template) as story:
        story.db.execute("select pgharness.cancel_run(%s)", (story.run,))
        story.db.execute("select pgharness.record_result(%s, 'conclusion', '\"b\"')", (story.run,))
        yield story


@pytest.fixture
def story(whole_story: Story) -> Iterator[Story]:
    """A cancelled run with notes, grades, calls, failures, a result and a log, in a transaction that is rolled back."""
    with whole_story.db.transaction(force_rollback=True):
        yield whole_story


def lines(db: Database, run: int, member: str) -> list[str]:
    """Return all lines of a member, fetched as an exporter does."""
    found: list[str] = []
    while page := rows(
        db,
        "select archive_rows as line from pgharness.archive_rows(%s, %s, %s)",
        run,
        member,
        found[-1] if found else None,
    ):
        found += [row["line"] for row in page]
    return found


def content_of(db: Database, run: int) -> Row:
    """Return the content of a run's archive, as an exporter makes it."""
    content: Row = value(db, "select pgharness.open_archive(%s)", str(run))
    for member in content["members"]:
        found = [line.encode() for line in lines(db, run, member["name"])]
        checksum = sum(int(hashlib.sha256(line).hexdigest()[:15], 16) for line in found)
        member |= {"rows": len(found), "checksum": str(checksum)}
    return content


def detach(db: Database, run: int, content: Row | None = None, *, digest: str = "a" * 64) -> Row:
    content = content_of(db, run) if content is None else content
    query = "select * from pgharness.detach_run(%s, %s, 'story.zip', 10, %s)"
    return rows(db, query, run, digest, json.dumps(content))[0]


def restore(db: Database, run: int, members: dict[str, list[str]], *, digest: str = "a" * 64) -> Row:
    db.execute("select pgharness.begin_restore(%s, %s)", (run, digest))
    for name, found in members.items():
        db.execute("select pgharness.restore_rows(%s, %s, %s)", (run, name, f"[{','.join(found)}]"))
    return rows(db, "select * from pgharness.finish_restore(%s)", run)[0]


def kept(db: Database, run: int) -> dict[str, list[str]]:
    """Return every row of a run that an archive takes away, as text."""
    return {
        table: [
            text
            for (text,) in db.execute(
                f"select t::text from pgharness.{table} as t where run_id = %s order by 1".encode(), (run,)
            )
        ]
        for table in DETACHED
    }


# -- what is in a file


def test_every_table_about_runs_is_in_an_archive(db: Database) -> None:
    about_runs = rows(
        db,
        "select distinct c.relname as name from pg_attribute as a join pg_class as c on c.oid = a.attrelid"
        " where c.relnamespace = 'pgharness'::regnamespace and c.relkind = 'r' and a.attname = 'run_id'",
    )
    members = {row["member"] for row in rows(db, "select member from pgharness._archive_members()")}
    assert {row["name"] for row in about_runs} - members <= NOT_ARCHIVED
    assert {row["member"] for row in rows(db, "select member from pgharness._archive_members() where is_detached")} == {
        *DETACHED
    }


def test_columns_of_json_that_leave_are_never_null(db: Database) -> None:
    """In a line, null would else be two things."""
    found = rows(
        db,
        "select a.attrelid::regclass::text || '.' || a.attname as name from pg_attribute as a"
        " join pgharness._archive_members() as m on a.attrelid = format('pgharness.%I', m.member)::regclass"
        " where m.is_detached and a.atttypid in ('json'::regtype, 'jsonb'::regtype) and not a.attnotnull and not a.attisdropped",
    )
    assert found == []


def test_an_archive_has_every_row_of_the_run_once_and_of_no_other(story: Story) -> None:
    other = start(story.db, "story")
    story.db.execute("select pgharness.cancel_run(%s)", (other,))
    for member in value(story.db, "select pgharness.open_archive(%s)", str(story.run))["members"]:
        found = [json.loads(line) for line in lines(story.db, story.run, member["name"])]
        assert all(list(row) == [column["name"] for column in member["columns"]] for row in found)
        if "run_id" in [column["name"] for column in member["columns"]]:
            count = value(story.db, f"select count(*) from pgharness.{member['name']} where run_id = %s", story.run)
            assert len(found) == count == len({json.dumps(row) for row in found}), member["name"]
            assert count > 0 or member["name"] in OF_CODE | OF_BATCHES
    assert len(lines(story.db, story.run, "runs")) == 1
    assert len(lines(story.db, story.run, "cases")) == 6 and len(lines(story.db, story.run, "rubrics")) == 12


def test_pages_end_at_a_number_of_rows_and_of_bytes(story: Story) -> None:
    query = "select count(*) from pgharness.archive_rows(%s, %s)"
    story.db.execute(
        "insert into pgharness.logs (run_id, message) select %s, i::text from generate_series(1, 12345) as i",
        (story.run,),
    )
    story.db.execute(
        "insert into pgharness.results (run_id, key, value) select %s, 'wide', to_jsonb(repeat('x', 2500000)) from generate_series(1, 5)",
        (story.run,),
    )
    assert value(story.db, query, story.run, "logs") == 5000
    assert value(story.db, query, story.run, "results") == 3  # the conclusion, and two of the wide ones
    assert len(lines(story.db, story.run, "logs")) == value(
        story.db, "select count(*) from pgharness.logs where run_id = %s", story.run
    )
    assert len(lines(story.db, story.run, "results")) == 6


def test_only_tables_of_an_archive_are_read(story: Story) -> None:
    with refused(story.db, "PH002", '"models" is no table of an archive'):
        lines(story.db, story.run, "models")


def test_lines_do_not_depend_on_the_session(story: Story) -> None:
    content = content_of(story.db, story.run)
    story.db.execute("set local timezone = 'Asia/Kolkata'; set local extra_float_digits = -3")
    assert content_of(story.db, story.run) == content
    detach(story.db, story.run, content)


# -- leaving


def test_a_run_that_is_not_finished_is_refused(tx: Database) -> None:
    add_instance(tx)
    run = start(tx)
    with refused(tx, "PH003", 'run "trial/1" is running', f"select pgharness.cancel_run({run});"):
        value(tx, "select pgharness.open_archive('trial/1')")
    with refused(tx, "PH003", 'run "trial/1" is running'):
        detach(tx, run, {"run_id": run, "members": []})
    with refused(tx, "PH001", 'run "nobody" does not exist'):
        value(tx, "select pgharness.open_archive('nobody')")


def test_a_run_that_a_worker_still_ends_calls_for_is_refused(tx: Database) -> None:
    add_instance(tx)
    run = start(tx)
    worker = register(tx)
    assert take(tx, worker) is not None
    tx.execute("select pgharness.cancel_run(%s)", (run,))
    with refused(tx, "PH003", "workers still end their calls", "Try again"):
        value(tx, "select pgharness.open_archive(%s)", str(run))
    tx.execute("update pgharness.workers set heartbeat_at = now() - interval '1 hour' where id = %s", (worker,))
    assert value(tx, "select pgharness.open_archive(%s)", str(run))["run"] == "trial/1"


def test_detaching_takes_the_bulk_and_leaves_what_the_run_was(story: Story) -> None:
    db, run = story.db, story.run
    progress = rows(db, "select * from pgharness.run_progress where run_id = %s", run)
    failed = rows(db, "select * from pgharness.failed_items where run_id = %s order by kind, ordinal", run)
    scores = rows(db, "select combination, mean_score from pgharness.combination_scores where run_id = %s", run)
    spent = rows(db, "select kind, sum(cost_usd) as cost_usd from pgharness.calls where run_id = %s group by kind", run)
    by_model = rows(db, "select * from pgharness.cost_by_model order by model_id")
    detach(db, run)
    assert rows(db, "select * from pgharness.cost_by_model order by model_id") == by_model, "money spent stays spent"
    left = {table: len(found) for table, found in kept(db, run).items()}
    assert left == {"notes": 0, "grades": 0, "calls": 0, "results": 0, "logs": 1}  # the log says that it was archived
    assert rows(db, "select * from pgharness.run_progress where run_id = %s", run) == progress
    assert rows(db, "select * from pgharness.failed_items where run_id = %s order by kind, ordinal", run) == failed
    (shown,) = rows(db, "select * from pgharness.archived_runs")
    assert (shown["run"], shown["file_name"], shown["digest"]) == ("story/1", "story.zip", "a" * 64)
    assert {row["combination"]: row["mean_score"] for row in shown["scores"]} == {
        row["combination"]: float(row["mean_score"]) for row in scores
    }
    for kind in spent:
        assert sum(row["cost_usd"] for row in shown["costs"] if row["kind"] == kind["kind"]) == pytest.approx(
            float(kind["cost_usd"])
        )


def test_the_totals_of_calls_leave_with_them_and_come_back(story: Story) -> None:
    db, run = story.db, story.run
    members = {name: lines(db, run, name) for name in DETACHED}
    read = [f"select * from pgharness.{view} as v order by v::text" for view in COSTS]
    before = [rows(db, query) for query in read]
    assert len(before[0]) > 3
    detach(db, run)
    assert rows(db, read[0]) == miscounted(db) == []
    restore(db, run, members)
    assert [rows(db, query) for query in read] == before and miscounted(db) == []
    db.execute("delete from pgharness.runs where id = %s", (run,))
    assert rows(db, read[0]) == miscounted(db) == []


@pytest.mark.parametrize(
    "change",
    [
        "update pgharness.notes set output = '\"another\"' where run_id = %(run)s and ordinal = 1",
        "update pgharness.grades set score = score / 2 where run_id = %(run)s",
        "delete from pgharness.calls where run_id = %(run)s and kind = 'grade'",
        "select pgharness.record_result(%(run)s, 'conclusion', '\"a\"')",
        "select pgharness.log(%(run)s, 'one more')",
    ],
)
def test_rows_that_are_not_those_in_the_file_do_not_leave(story: Story, change: str) -> None:
    db, run = story.db, story.run
    content = content_of(db, run)
    db.execute(change.encode(), {"run": run})
    before = kept(db, run)
    with refused(db, "PH004", "are not those in the file", "Nothing was deleted", "pgharness archive"):
        detach(db, run, content)
    assert kept(db, run) == before and run_of(db, run)["archived_at"] is None


def test_a_content_that_lacks_a_table_or_is_of_another_run_is_refused(story: Story) -> None:
    content = content_of(story.db, story.run)
    with refused(story.db, "PH002", f"archive of run {story.run + 1}"):
        detach(story.db, story.run, content | {"run_id": story.run + 1})
    members = [member for member in content["members"] if member["name"] != "calls"]
    with refused(story.db, "PH004", "calls of run", "in the file none"):
        detach(story.db, story.run, content | {"members": members})


def test_detaching_twice_is_detaching_once(story: Story) -> None:
    content = content_of(story.db, story.run)
    first = detach(story.db, story.run, content)
    assert detach(story.db, story.run, content) == first
    with refused(story.db, "PH003", "is archived already, in story.zip"):
        detach(story.db, story.run, content, digest="b" * 64)
    with refused(story.db, "PH003", "is archived already, in story.zip", "archived_runs"):
        value(story.db, "select pgharness.open_archive('story/1')")


def test_one_session_at_a_time_archives_a_run(whole_story: Story) -> None:
    db = whole_story.db
    with psycopg.connect(db.info.dsn) as other:
        other.execute("select pgharness.open_archive('story/1')")
        with refused(db, "PH003", "is being archived by another session"):
            value(db, "select pgharness.open_archive('story/1')")
        other.rollback()
    assert value(db, "select pgharness.open_archive('story/1') is not null")


def test_a_row_that_is_being_added_is_waited_for(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db, psycopg.connect(url) as adding:
        add_instance(db)
        run = start(db)
        db.execute("select pgharness.cancel_run(%s)", (run,))
        content = content_of(db, run)
        adding.execute("select pgharness.record_result(%s, 'late', '1')", (run,))
        said: list[str] = []

        def try_to_detach() -> None:
            with psycopg.connect(url, autocommit=True) as third:
                try:
                    detach(third, run, content)
                except psycopg.Error as exc:
                    said.append(exc.sqlstate or "")

        thread = threading.Thread(target=try_to_detach)
        thread.start()
        while not value(db, "select count(*) from pg_locks where not granted"):
            assert thread.is_alive()
        adding.commit()
        thread.join()
        assert said == ["PH004"]
        assert value(db, "select value from pgharness.results where run_id = %s", run) == 1


# -- being archived


def test_an_archived_run_is_not_continued(story: Story) -> None:
    db, run = story.db, story.run
    detach(db, run)
    for statement in (
        f"select pgharness.resume_run({run})",
        f"select pgharness.resume_run({run}, budget_usd => 100000)",
    ):
        with refused(
            db,
            "PH003",
            'run "story/1" is archived',
            "story.zip",
            "pgharness unarchive",
            f"select pgharness.rerun({run});",
        ):
            db.execute(statement.encode())
    assert value(db, "select (pgharness.cancel_run(%s)).status", run) == "cancelled"
    assert value(db, "select (pgharness.rerun(%s)).notes", run) == run_of(db, run)["note_count"]


def test_failed_items_of_an_archived_run_are_not_retried(tx: Database) -> None:
    add_instance(tx, failure_threshold=0.1)
    run = start(tx)
    worker = register(tx)
    record(tx, worker, *(failure(run, "note", ordinal, is_retryable=False) for ordinal in range(2)))
    assert run_of(tx, run)["status"] == "failed"
    detach(tx, run)
    with refused(tx, "PH003", "is archived", "pgharness unarchive"):
        tx.execute("select pgharness.retry_failed(%s)", (run,))
    assert value(tx, "select count(*) from pgharness.failures where run_id = %s and status = 'failed'", run) == 2


def test_a_call_that_ends_late_is_still_counted(story: Story) -> None:
    db, run = story.db, story.run
    detach(db, run)
    before = run_of(db, run)["note_cost_usd"]
    record(
        db,
        story.worker,
        failure(
            run,
            "note",
            0,
            calls=[
                {
                    "model_id": 5,
                    "outcome": "cancelled",
                    "cost_usd": 0.5,
                    "latency_ms": 60_000,
                    "started_at": datetime.now(UTC).isoformat(),
                }
            ],
        ),
    )
    assert run_of(db, run)["note_cost_usd"] - before == 0.5


def test_a_run_that_was_completed_is_archived_too(tx: Database) -> None:
    add_instance(tx)
    run = start(tx)
    work_off(tx, register(tx))
    detach(tx, run)
    assert run_of(tx, run)["status"] == "completed" and not any(
        kept(tx, run)[table] for table in ("notes", "grades", "calls")
    )


def test_archiving_is_for_the_owner(tx: Database) -> None:
    if not value(tx, "select rolsuper from pg_roles where rolname = current_user"):
        pytest.skip("only a superuser can act as somebody else")
    add_instance(tx)
    run = start(tx)
    tx.execute("select pgharness.cancel_run(%s)", (run,))
    content = json.dumps(content_of(tx, run))
    for role in ("reader", "author", "worker"):
        tx.execute(f"set local role pgharness_{role}".encode())
        for statement in (
            "select pgharness.detach_run(%(run)s, repeat('a', 64), 'file', 1, %(content)s)",
            "select pgharness.begin_restore(%(run)s, repeat('a', 64))",
            "select pgharness.restore_rows(%(run)s, 'notes', '[]')",
            "select pgharness.finish_restore(%(run)s)",
        ):
            with refused(tx, "42501", "permission denied for function"):
                tx.execute(statement.encode(), {"run": run, "content": content})
    tx.execute("reset role; set local role pgharness_author")
    assert value(tx, "select count(*) from pgharness.archive_rows(%s, 'run_cases')", run) == 2


# -- coming back


def test_what_comes_back_is_what_left(story: Story) -> None:
    db, run = story.db, story.run
    before = kept(db, run)
    members = {name: lines(db, run, name) for name in DETACHED}
    detach(db, run)
    archive = restore(db, run, members)
    assert archive["restored_at"] is not None and archive["restored_rows"] == {}
    after = kept(db, run)
    assert [text for text in after["logs"] if ",archived," not in text and ",restored," not in text] == before.pop(
        "logs"
    )
    assert {name: after[name] for name in before} == before
    assert run_of(db, run)["archived_at"] is None
    assert rows(db, "select * from pgharness.archived_runs") == []
    assert rows(db, "select * from pgharness.finish_restore(%s)", run) == [archive]
    assert value(db, "select restored_at from pgharness.begin_restore(%s, %s)", run, "a" * 64) == archive["restored_at"]
    assert value(db, "select (pgharness.resume_run(%s)).status", run) == "running"


def test_a_restored_run_can_be_archived_again(story: Story) -> None:
    members = {name: lines(story.db, story.run, name) for name in DETACHED}
    detach(story.db, story.run)
    restore(story.db, story.run, members)
    again = detach(story.db, story.run, digest="b" * 64)
    assert (again["digest"], again["restored_at"]) == ("b" * 64, None)
    with refused(story.db, "PH004", "the file is not the archive of run", "story.zip"):
        story.db.execute("select pgharness.begin_restore(%s, %s)", (story.run, "a" * 64))


def test_rows_that_lack_or_differ_do_not_come_back(story: Story) -> None:
    db, run = story.db, story.run
    members = {name: lines(db, run, name) for name in DETACHED}
    detach(db, run)
    changed = json.loads(members["grades"][0]) | {"attempts": 99}
    for wrong in (
        {"calls": members["calls"][1:]},
        {"grades": [json.dumps(changed), *members["grades"][1:]]},
        {"logs": [line.replace(f'"run_id":{run}', '"run_id":null') for line in members["logs"]]},
    ):
        with refused(db, "PH004", f"{next(iter(wrong))} of run {run} that came back are not those that left"):
            restore(db, run, members | wrong)
    assert run_of(db, run)["archived_at"] is not None
    restore(db, run, members)


def test_only_the_archive_of_a_run_of_this_database_is_restored(story: Story) -> None:
    db, run = story.db, story.run
    with refused(db, "PH003", 'run "story/1" was never archived here'):
        db.execute("select pgharness.begin_restore(%s, %s)", (run, "a" * 64))
    with refused(db, "PH001", "run 987 is not in this database"):
        db.execute("select pgharness.begin_restore(987, %s)", ("a" * 64,))
    with refused(db, "PH003", "is not archived"):
        db.execute("select pgharness.restore_rows(%s, 'notes', '[]')", (run,))
    with refused(db, "PH003", "was never archived"):
        db.execute("select pgharness.finish_restore(%s)", (run,))
    detach(db, run)
    for table in ("runs", "failures", "models"):
        with refused(db, "PH002", f'"{table}" is no table whose rows left'):
            db.execute("select pgharness.restore_rows(%s, %s, '[]')", (run, table))


def test_an_archive_outlives_changes_of_its_tables(story: Story) -> None:
    db, run = story.db, story.run
    members = {name: lines(db, run, name) for name in DETACHED}
    detach(db, run)
    db.execute(
        "alter table pgharness.notes add column stars integer not null default 3;"
        "alter table pgharness.calls alter column http_status type text, drop column finish_reason;"
        "alter table pgharness.grades add column doubled numeric generated always as (score * 2) stored"
    )
    restore(db, run, members)
    assert value(db, "select count(*) from pgharness.notes where run_id = %s and stars = 3", run) == len(
        members["notes"]
    )
    assert value(db, "select count(*) from pgharness.calls where run_id = %s", run) == len(members["calls"])
    detach(db, run, digest="c" * 64)  # and in the new shape


def test_deleting_an_archived_run_forgets_its_archive(story: Story) -> None:
    detach(story.db, story.run)
    story.db.execute("delete from pgharness.runs where id = %s", (story.run,))
    assert value(story.db, "select count(*) from pgharness.archives") == 0
