"""Asking for reports in SQL: what is refused, what is made once, and what becomes of a worker that dies."""

from __future__ import annotations

import base64
import json
from typing import Any

import psycopg
import pytest

from world import add_instance, refused, register, rows, start, value

Database = psycopg.Connection[Any]
_FILES = json.dumps(
    [{"path": "report.md", "media_type": "text/markdown", "content": base64.b64encode(b"# R").decode()}]
)


@pytest.fixture
def tx(db: Database) -> Database:
    """A transaction that is rolled back, with a run in it."""
    add_instance(db)
    start(db)
    return db


def ask(db: Database, arguments: str = "'trial/1'") -> dict[str, Any]:
    return rows(db, f"select * from pgharness.request_report({arguments})")[0]


def test_a_report_is_asked_for_by_name_or_id_and_once(tx: Database) -> None:
    run = value(tx, "select id from pgharness.runs")
    first = ask(tx)
    assert (first["run_ids"], first["formats"], first["alpha"], first["status"]) == (
        [run],
        ["html", "md"],
        0.05,
        "pending",
    )
    assert ask(tx, str(run))["id"] == ask(tx, f"'{run}', compared_with => '{{trial/1}}'")["id"] == first["id"]
    assert ask(tx, "'trial/1', formats => '{json}'")["id"] != first["id"] != ask(tx, "'trial/1', anew => true")["id"]


def test_what_was_made_of_a_run_that_goes_on_is_made_anew(tx: Database) -> None:
    worker = register(tx)
    version = value(tx, "select version from pgharness.workers")

    def made(minute: int) -> int:
        """Ask for a report at a time, and make it if it is a new one."""
        tx.execute("select set_config('pgharness.fake_now', %s, true)", (f"2030-01-01 00:{minute:02}+00",))
        report = ask(tx)["id"]
        for taken in rows(tx, "select id from pgharness.take_report(%s)", worker):
            finish = "select pgharness.finish_report(%s, %s, 'R', %s, '[]')"
            assert value(tx, finish, taken["id"], worker, version) is True
        return int(report)

    begun, later = made(1), made(2)
    assert later > begun
    tx.execute("select pgharness.cancel_run('trial/1')")
    ended = made(3)
    assert ended > later and made(4) == ended
    plan = json.dumps([{"first": "gen -> judge", "second": "other"}])
    tx.execute("insert into pgharness.models (name, provider) values ('another', 'simulator')")
    tx.execute(
        "insert into pgharness.model_combinations (instance, name, generator, grader) select 'trial', n, 'another', 'exact_match'"
        " from unnest('{gen -> judge,other}'::text[]) as n"
    )
    tx.execute("select pgharness.preregister('trial', %s)", (plan,))
    assert made(5) > ended


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("'nosuch'", "PH001", "nosuch"),
        ("'trial/1', formats => '{pdf}'", "PH002", 'format "pdf"'),
        ("'trial/1', formats => '{}'", "PH002", "no format"),
        ("'trial/1', formats => '{md,null}'", "PH002", "no format"),
        ("'trial/1', compared_with => '{nosuch}'", "PH001", "nosuch"),
        ("'trial/1', alpha => 2", "PH002", "alpha is 2"),
        ("'trial/1', alpha => 'NaN'", "PH002", "alpha is NaN"),
    ],
)
def test_what_cannot_be_reported_is_refused(tx: Database, arguments: str, code: str, said: str) -> None:
    with refused(tx, code, said):
        ask(tx, arguments)


def test_a_worker_takes_a_report_keeps_its_files_and_only_its_own(tx: Database) -> None:
    report = ask(tx)["id"]
    mine, other = register(tx), register(tx, pid=2)
    assert [row["id"] for row in rows(tx, "select * from pgharness.take_report(%s)", mine)] == [report]
    assert rows(tx, "select * from pgharness.take_report(%s)", other) == []
    finish = "select pgharness.finish_report(%s, %s, 'R', '0.1.0', %s)"
    assert value(tx, finish, report, other, _FILES) is False
    assert value(tx, finish, report, mine, _FILES) is True
    assert value(tx, "select pgharness.fail_report(%s, %s, 'late')", report, mine) is False
    (file,) = rows(tx, "select * from pgharness.report_files")
    assert (file["path"], bytes(file["content"]), file["size_bytes"], file["runs"]) == (
        "report.md",
        b"# R",
        3,
        ["trial/1"],
    )
    tx.execute("delete from pgharness.reports")
    assert rows(tx, "select * from pgharness.report_contents") == []


def test_a_report_whose_worker_died_is_taken_by_another_and_given_up_at_last(tx: Database) -> None:
    report = ask(tx)["id"]
    for number in range(5):
        worker = register(tx, pid=10 + number)
        assert [row["id"] for row in rows(tx, "select * from pgharness.take_report(%s)", worker)] == [report]
        tx.execute("update pgharness.workers set status = 'lost' where id = %s", (worker,))
    assert rows(tx, "select * from pgharness.take_report(%s)", register(tx, pid=99)) == []
    (row,) = rows(tx, "select status, error from pgharness.reports")
    assert row["status"] == "failed" and row["error"].startswith("its worker died 5 times")


def test_a_file_stays_below_its_folder(tx: Database) -> None:
    report, worker = ask(tx)["id"], register(tx)
    rows(tx, "select * from pgharness.take_report(%s)", worker)
    with refused(tx, "23514", "report_contents_path_check"):
        files = _FILES.replace("report.md", "../report.md")
        tx.execute("select pgharness.finish_report(%s, %s, 'R', '0.1.0', %s)", (report, worker, files))
