"""Who may do what: a reader sees, an author defines and starts, a worker works, and none of them does more."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pgharness import schema
from pgharness.analysis import analyse
from world import (
    add_cases,
    add_instance,
    call,
    clear,
    contents,
    note,
    orphans,
    refused,
    register,
    rows,
    run_of,
    start,
    value,
    work_off,
)

Database = Connection[Any]
ROLES = ("reader", "author", "worker")
# what the harness alone writes
WRITTEN = [
    "runs",
    "run_definitions",
    "run_cases",
    "run_combinations",
    "run_rubrics",
    "run_workers",
    "workers",
    "notes",
    "grades",
    "settled_scores",
    "settled_note_scores",
    "settled_pairs",
    "settled_spreads",
    "failures",
    "calls",
    "call_totals",
    "batches",
    "batch_items",
    "model_members",
    "results",
    "logs",
    "model_limits",
    "model_leases",
    "instance_spending",
    "project_spending",
    "run_leases",
    "responses",
    "response_claims",
    "archives",
    "experiment_versions",
    "run_versions",
    "tasks",
    "metrics",
    "timings",
    "logged_calls",
    "artifacts",
    "artifact_contents",
    "progress_reports",
    "tellers",
    "schema_migrations",
    "analyses",
    "reports",
    "report_contents",
    "preregistrations",
]
DEFINED = [
    "projects",
    "experiments",
    "instances",
    "datasets",
    "cases",
    "rubrics",
    "models",
    "model_prices",
    "instance_cases",
    "model_combinations",
]


@pytest.fixture(scope="module")
def logins(server_url: str, template: str) -> Iterator[dict[str, str]]:
    """A login of each role, and one of none; roles are of the whole server, so their names are."""
    prefix = f"pgharness_test_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(server_url, autocommit=True) as admin:
        if not value(admin, "select rolsuper from pg_roles where rolname = current_user"):
            pytest.skip("only a superuser can act as somebody else")
        names = {role: f"{prefix}_{role}" for role in (*ROLES, "nobody")}
        for role, name in names.items():
            admin.execute(f"create role {name} login".encode())
            if role != "nobody":
                admin.execute(f"grant pgharness_{role} to {name}".encode())
        yield names
        for name in names.values():
            admin.execute(f"drop role {name}".encode())


class Office:
    """A database in which something happened, and its owner, who can act as the others."""

    def __init__(self, db: Database, logins: dict[str, str]) -> None:
        self.db = db
        self._logins = logins

    @contextmanager
    def acting(self, role: str) -> Iterator[Database]:
        """Act as a login of a role; what is done is kept."""
        self.db.execute(f"set session authorization {self._logins[role]}".encode())
        try:
            yield self.db
        finally:
            self.db.execute("reset session authorization")


@pytest.fixture
def office(shared_url: str, logins: dict[str, str]) -> Iterator[Office]:
    with psycopg.connect(shared_url, autocommit=True) as db:
        clear(db)
        add_instance(db, cases=2, rubrics_per_case=1)
        start(db)
        yield Office(db, logins)


def tables(db: Database, kinds: str) -> list[str]:
    found = db.execute(
        "select relname from pg_class where relnamespace = 'pgharness'::regnamespace and relkind::text = any (%s) order by 1",
        (list(kinds),),
    )
    return [name for (name,) in found.fetchall()]


def write_attempts(db: Database, table: str) -> Iterator[str]:
    """Yield statements that would change a table or view."""
    columns = rows(
        db,
        "select attname, attgenerated <> '' or attidentity <> '' as is_made from pg_attribute"
        " where attrelid = format('pgharness.%%I', %s::text)::regclass and attnum > 0 and not attisdropped order by attnum",
        table,
    )
    column = next(c["attname"] for c in columns if not c["is_made"])
    yield f"insert into pgharness.{table} ({column}) values (null)"
    yield f"update pgharness.{table} set {column} = {column}"
    yield f"delete from pgharness.{table}"
    yield f"truncate pgharness.{table} cascade"


# -- everybody


@pytest.mark.parametrize("role", ROLES)
def test_every_role_sees_every_view_and_table(office: Office, role: str) -> None:
    everything = tables(office.db, "vr")
    assert len(everything) > 30
    with office.acting(role) as db:
        for name in everything:
            db.execute(f"select * from pgharness.{name}".encode()).fetchall()
        assert value(db, "select pgharness.clock() is not null")
        schema.verify(db)


@pytest.mark.parametrize("role", [*ROLES, "nobody"])
def test_no_role_writes_what_the_harness_writes_nor_any_view(office: Office, role: str) -> None:
    written = [*WRITTEN, *tables(office.db, "v")]
    assert not set(tables(office.db, "r")) - {*WRITTEN, *DEFINED}
    before = contents(office.db)
    for table in written:
        for statement in write_attempts(office.db, table):
            with office.acting(role) as db, refused(db, "42501 42809 55000" if table not in WRITTEN else "42501"):
                if table == "runs" and statement.startswith("insert") and role == "author":
                    statement = "insert into pgharness.runs (instance, status) values ('trial', 'completed')"
                db.execute(statement.encode())
    assert contents(office.db) == before


def test_somebody_without_a_role_sees_nothing_and_calls_nothing(office: Office) -> None:
    for statement in (
        "select * from pgharness.runs",
        "select * from pgharness.run_progress",
        "select pgharness.clock()",
        "select pgharness.start_run('trial')",
        "select pgharness.record_outcomes(1, '[]')",
        "select * from procrastinate.procrastinate_jobs",
    ):
        with office.acting("nobody") as db, refused(db, "42501", "schema"):
            db.execute(statement.encode())


def test_no_role_makes_objects_in_our_schemas_or_becomes_their_owner(office: Office) -> None:
    for role in ROLES:
        for statement in (
            "create table pgharness.mine (id bigint)",
            "create table procrastinate.mine (id bigint)",
            "create or replace function pgharness.clock() returns timestamptz language sql as 'select now()'",
            "alter table pgharness.runs disable trigger all",
            "drop view pgharness.run_progress",
            "drop function pgharness.cancel_run(bigint, text)",
            "create trigger t before insert on pgharness.cases for each row execute function pgharness._resolve_cases()",
        ):
            with office.acting(role) as db, refused(db, "42501"):
                db.execute(statement.encode())


# -- a reader


def test_a_reader_changes_nothing_at_all(office: Office) -> None:
    before = contents(office.db)
    attempts = [statement for table in DEFINED for statement in write_attempts(office.db, table)]
    attempts += [
        "select pgharness.start_run('trial')",
        "select pgharness.cancel_run(1)",
        "select pgharness.cancel_run('trial/1')",
        "select pgharness.add_cases('trial')",
        "select pgharness.log(null, 'x')",
        "select pgharness.record_result(1, 'x', '1')",
        "select pgharness.record_outcomes(1, '[]')",
        "select pgharness.sweep()",
        "select pgharness.request_analysis('compare', runs => '{trial/1}')",
        "select pgharness.preregister('trial', '[]')",
        "select pgharness.register_worker('h', 1, 'v', '{}', 1)",
        "select pgharness._set_status(1, 'completed', null)",
        "insert into procrastinate.procrastinate_jobs (queue_name, task_name) values ('note', 'pgharness.slice')",
        "delete from procrastinate.procrastinate_jobs",
        "update procrastinate.procrastinate_jobs set status = 'doing'",
        "select procrastinate.procrastinate_fetch_job_v2('{note}', null)",
        "select procrastinate.procrastinate_register_worker_v1()",
    ]
    for statement in attempts:
        with office.acting("reader") as db, refused(db, "42501"):
            db.execute(statement.encode())
    assert contents(office.db) == before


# -- an author


def test_an_author_defines_starts_and_controls_by_sql_alone(office: Office) -> None:
    with office.acting("author") as db:
        db.execute(
            "insert into pgharness.projects (name) values ('p'); insert into pgharness.datasets (name) values ('d')"
        )
        db.execute(
            """insert into pgharness.experiments (name, config_schema) values ('e', '{"properties": {"depth": {"maximum": 5}}}')"""
        )
        db.execute("insert into pgharness.models (name, provider, model) values ('mine', 'openai', 'gpt')")
        db.execute(
            "update pgharness.models set max_concurrency = 5 where name = 'mine'; delete from pgharness.models where name = 'mine'"
        )
        add_instance(db, "mine", cases=0, project="p", experiment="e", rubrics_per_case=1)
        add_cases(db, 3)
        db.execute("update pgharness.cases set dataset = 'd' where name like 'case-%'")
        assert value(db, "select pgharness.add_cases('mine', eligible => true, dataset => 'd')") == 3
        with refused(db, "PH002", "config.depth"):
            db.execute("""update pgharness.instances set config = '{"depth": 6}'""")
        assert db.execute("""select * from pgharness.schema_violations('{"maximum": 2}', '3')""").rowcount == 1
        assert db.execute("""select * from pgharness.schema_problems('{"maximum": "x"}')""").rowcount == 1
        run = start(db, "mine", idempotency_key="k")
        assert start(db, "mine", idempotency_key="k") == run
        inserted = value(
            db,
            "insert into pgharness.runs (instance, kind, name, priority, budget_usd) values ('mine', 'milestone', 'n', 2, 9) returning id",
        )
        for action in ("pause_run", "resume_run", "cancel_run", "resume_run", "retry_failed", "requeue_run"):
            db.execute(f"select pgharness.{action}(%s), pgharness.{action}('n')".encode(), (run,))
        again = value(db, "select run_id from pgharness.rerun(%s)", run)
        db.execute("select pgharness.log(%s, 'hello'), pgharness.record_result(%s, 'k', '1')", (run, run))
        with refused(db, "PH003", "was used by run"):
            db.execute("delete from pgharness.cases where name = 'case-1'")
        author = value(db, "select session_user::text")
    assert {run_of(office.db, id_)["created_by"] for id_ in (run, inserted, again)} == {author}
    assert {
        row["by"]
        for row in rows(
            office.db, "select data ->> 'by' as by from pgharness.logs where run_id = %s and level <> 'info'", run
        )
    } == {author}
    assert orphans(office.db) == []


def test_an_author_cannot_do_what_workers_do_nor_go_around_the_functions(office: Office) -> None:
    run = value(office.db, "select id from pgharness.runs")
    before = contents(office.db)
    for statement in (
        "insert into pgharness.runs (instance, status) values ('trial', 'completed')",
        "insert into pgharness.runs (instance, note_count) values ('trial', 0)",
        "insert into pgharness.runs (instance, epoch) values ('trial', 7)",
        "insert into pgharness.runs (instance, created_by) values ('trial', 'postgres')",
        "update pgharness.runs set status = 'completed'",
        "update pgharness.runs set budget_usd = 1000",
        f"select pgharness.record_outcomes(1, '{json.dumps([note(run, 0)])}')",
        f"select pgharness.load_slice(1, '{{\"run_id\": {run}}}')",
        f"select pgharness.load_run({run})",
        f"select pgharness.charge_crash({run}, 'note', 0)",
        "select pgharness.register_worker('h', 1, 'v', '{}', 1)",
        "select pgharness.attach_queue_worker(1, 1)",
        "select pgharness.heartbeat(1, '{}', 'running', '{}', '{}')",
        "select pgharness.lose_worker('host', 1)",
        "select pgharness.sweep('0 seconds')",
        "select pgharness.take_analysis(1)",
        "select pgharness.finish_analysis(1, 1, '', '{}', '{}')",
        "select pgharness.fail_analysis(1, 1, 'because')",
        "select pgharness.lease_model(1, 1, 0, 1)",
        "select pgharness.take_requests(1, 1, 1)",
        "select pgharness.block_model(1, 1)",
        "select procrastinate.procrastinate_fetch_job_v2('{note}', null)",
        "delete from procrastinate.procrastinate_jobs",
    ):
        with office.acting("author") as db, refused(db, "42501"):
            db.execute(statement.encode())
    assert contents(office.db) == before


def test_an_analysis_goes_from_an_author_by_a_worker_to_a_reader(office: Office) -> None:
    work_off(office.db, register(office.db))
    with office.acting("author") as db:
        asked = value(db, "select id from pgharness.request_analysis('compare', runs => '{trial/1}')")
        pair = '[{"first": "combination 0", "second": "combination 1"}]'
        with refused(db, "PH001", "combination 0"):
            db.execute("select pgharness.preregister('trial', %s)", (pair,))
        db.execute(
            "insert into pgharness.model_combinations (instance, name, generator, grader) values ('trial', 'combination 1', 'simulator', 'simulator')"
        )
        db.execute("select pgharness.preregister('trial', %s)", (pair,))
    with office.acting("worker") as db:
        worker = value(db, "select pgharness.register_worker('h', 7, 'v', '{note,grade}', 1)")
        (row,) = rows(db, "select * from pgharness.take_analysis(%s)", worker)
        assert row["id"] == asked
        digest = value(db, "select pgharness.analysis_digest(%s)", row["run_ids"])
        found = json.dumps(analyse(db, row["kind"], row["run_ids"], row["options"]).as_dict())
        assert value(db, "select pgharness.finish_analysis(%s, %s, %s, '{}', %s)", asked, worker, digest, found)
    with office.acting("reader") as db:
        assert rows(db, "select * from pgharness.analysis_results")[0]["is_current"]
        assert len(rows(db, "select * from pgharness.analysis_groups")) == 1
        assert len(rows(db, "select * from pgharness.combination_estimates")) == 1
        assert len(rows(db, "select * from pgharness.paired_run_differences('trial/1', 'trial/1')")) == 1


# -- a worker


def test_a_worker_does_all_of_its_work(office: Office) -> None:
    run = value(office.db, "select id from pgharness.runs")
    with office.acting("worker") as db:
        db.execute("set search_path = procrastinate, pg_temp")
        worker = value(db, "select pgharness.register_worker('h', 1, 'v', '{note,grade}', 1)")
        queue_worker = value(db, "select worker_id from procrastinate_register_worker_v1()")
        db.execute("select pgharness.attach_queue_worker(%s, %s)", (worker, queue_worker))
        model = value(db, "select id from pgharness.models where name = 'simulator'")
        db.execute(
            "select pgharness.lease_model(%s, %s, 0, 1), pgharness.take_requests(%s, 1, 1), pgharness.block_model(%s, 0)",
            (worker, model, model, model),
        )
        retried = False
        while job := db.execute(
            "select id, args from procrastinate_fetch_job_v2('{note,grade}', %s) where id is not null", (queue_worker,)
        ).fetchone():
            id_, args = job
            assert value(db, "select pgharness.load_run(%s)", args["run_id"])["run"] == "trial/1"
            items = rows(db, "select * from pgharness.load_slice(%s, %s)", worker, json.dumps(args))
            rubric_ids = [item["rubric_id"] for item in items if item["rubric_id"]]
            db.execute(
                "select pgharness.load_inputs(%s, %s, %s, '{0}')", (run, [i["case_id"] for i in items], rubric_ids)
            )
            db.execute("select pgharness.charge_crash(%s, %s, %s)", (run, args["kind"], items[0]["ordinal"]))
            db.execute("select pgharness.heartbeat(%s, '{}', 'running', %s, %s)", (worker, [run], [id_]))
            if not retried:
                db.execute("select procrastinate_retry_job_v2(%s, now(), null, null, null)", (id_,))
                retried = True
                continue
            verdicts = {"verdicts": [{"rationale": "r", "satisfaction": 5}] * 2} if args["kind"] == "grade" else {}
            outcomes = [
                note(run, item["ordinal"], kind=args["kind"], calls=[call(model_id=model)], **verdicts)
                for item in items
            ]
            db.execute("select pgharness.record_outcomes(%s, %s)", (worker, json.dumps(outcomes)))
            db.execute("select procrastinate_finish_job_v1(%s, 'succeeded', true)", (id_,))
        db.execute(
            "select pgharness.log(%s, 'done'), pgharness.record_result(%s, 'k', '1'), pgharness.lose_worker('h', 1), pgharness.sweep()",
            (run, run),
        )
        db.execute("listen pgharness")
        db.execute("reset search_path")
    assert run_of(office.db, run)["status"] == "completed"
    assert value(office.db, "select count(*) from pgharness.run_workers where worker_id = %s", worker) == 1
    assert orphans(office.db) == []


def test_a_worker_defines_and_controls_nothing(office: Office) -> None:
    before = contents(office.db)
    attempts = [statement for table in DEFINED for statement in write_attempts(office.db, table)]
    attempts += [
        "select pgharness.start_run('trial')",
        "select pgharness.rerun('trial/1')",
        "select pgharness.add_cases('trial')",
        "insert into pgharness.runs (instance) values ('trial')",
        *(
            f"select pgharness.{action}('trial/1')"
            for action in ("pause_run", "resume_run", "cancel_run", "retry_failed", "requeue_run")
        ),
    ]
    for statement in attempts:
        with office.acting("worker") as db, refused(db, "42501"):
            db.execute(statement.encode())
    assert contents(office.db) == before


# -- functions


def test_the_harness_own_privileges_are_behind_public_functions_only(office: Office) -> None:
    borrowed = rows(
        office.db,
        """select p.oid::regprocedure::text as name, r.role, p.proname like '\\_%%' as is_private
             from pg_proc as p cross join unnest(array['public', 'pgharness_reader', 'pgharness_author', 'pgharness_worker']) as r (role)
            where p.pronamespace = 'pgharness'::regnamespace and p.prosecdef and p.prorettype <> 'trigger'::regtype
              and has_function_privilege(r.role, p.oid, 'execute')""",
    )
    assert [f for f in borrowed if f["role"] in ("public", "pgharness_reader") or f["is_private"]] == []


def test_a_path_of_ones_own_does_not_lead_a_privileged_function_astray(office: Office) -> None:
    run = value(office.db, "select id from pgharness.runs")
    with office.acting("author") as db:
        db.execute("create temporary table runs (id bigint, status text); create temporary table logs (id bigint)")
        db.execute("set search_path = pg_temp, public")
        db.execute("select pgharness.cancel_run(%s)", (run,))
        db.execute("reset search_path")
        db.execute("drop table pg_temp.runs, pg_temp.logs")
    assert run_of(office.db, run)["status"] == "cancelled"
    pinned = "select p.proname from pg_proc as p where p.pronamespace = 'pgharness'::regnamespace and p.prosecdef and not coalesce(array_to_string(p.proconfig, ' ') ~ 'search_path=pgharness.*pg_temp', false)"
    assert rows(office.db, pinned) == []
