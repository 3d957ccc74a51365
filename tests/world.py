"""Small worlds to test the SQL half in: an instance with its cases, a worker driven by hand, and `orphans`.

`orphans` says everything that is wrong with a database: counters that no row backs, rows outside of their plan, work
that nobody will do, jobs that nobody waits for. A test that broke something asserts that it is empty.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

Database = psycopg.Connection[Any]
Row = dict[str, Any]
_TRIES = itertools.count(1)

_ORPHANS = """
with plan as (
    select r.*, d.grade_stride, d.case_count, d.combination_count, d.transcript_overlaps, d as definition,
           (d.definition ->> 'note_replications')::bigint as note_replications
      from pgharness.runs as r join pgharness.run_definitions as d on d.run_id = r.id
), note_failure as (
    select f.run_id, f.ordinal, f.status, c.grades_per_note
      from pgharness.failures as f
      join plan as p on p.id = f.run_id
      join pgharness.run_combinations as c on c.run_id = f.run_id and c.number = f.ordinal % p.combination_count
     where f.kind = 'note'
), planned_grade as (
    select n.run_id, n.ordinal * p.grade_stride + k as ordinal, place.rubric_number, place.replication, n.ordinal as note_ordinal,
           rr.rubric_id
      from pgharness.notes as n
      join plan as p on p.id = n.run_id
      join pgharness.run_combinations as c on c.run_id = n.run_id and c.number = n.combination_number
     cross join lateral generate_series(0, c.grades_per_note - 1) as k
     cross join lateral pgharness._grade_place(c, k) as place
      left join pgharness.run_rubrics as rr
        on rr.run_id = n.run_id and rr.case_number = n.case_number and rr.number = place.rubric_number
), item as (
    select p.id as run_id, 'note' as kind, o as ordinal,
           exists (select from pgharness.notes as n where n.run_id = p.id and n.ordinal = o) as is_done
      from plan as p cross join lateral generate_series(0, p.note_count - 1) as o
    union all
    select g.run_id, 'grade', g.ordinal, exists (
               select from pgharness.grades as done
                where done.run_id = g.run_id and done.note_ordinal = g.note_ordinal and done.ordinal = g.ordinal
                  and done.rubric_number = g.rubric_number and done.replication = g.replication
                  and done.rubric_id is not distinct from g.rubric_id)
      from planned_grade as g
)
select format('run %s counts %s notes and %s grades in its plan', p.id, p.note_count, p.grade_count)
  from plan as p
 where p.note_count <> p.case_count * p.combination_count * cardinality(p.transcript_overlaps) * p.note_replications
    or p.grade_count <> p.case_count * cardinality(p.transcript_overlaps) * p.note_replications
                        * (select sum(c.grades_per_note) from pgharness.run_combinations as c where c.run_id = p.id)
union all
select format('run %s has no definition', r.id) from pgharness.runs as r
 where not exists (select from pgharness.run_definitions as d where d.run_id = r.id)
union all
select format('run %s counts %s notes, its rows say %s', p.id, p.notes_succeeded, rows_.count)
  from plan as p, lateral (select count(*) from pgharness.notes as n where n.run_id = p.id) as rows_
 where p.notes_succeeded <> rows_.count
union all
select format('run %s counts %s grades, its rows say %s', p.id, p.grades_succeeded, rows_.count)
  from plan as p, lateral (select count(*) from pgharness.grades as g where g.run_id = p.id) as rows_
 where p.grades_succeeded <> rows_.count
union all
select format('run %s counts %s failed %ss, its rows say %s', p.id, counter.failed, counter.kind, rows_.count)
  from plan as p, lateral (values ('note', p.notes_failed), ('grade', p.grades_failed)) as counter (kind, failed),
       lateral (select count(*) from pgharness.failures as f
                 where f.run_id = p.id and f.kind = counter.kind and f.status = 'failed') as rows_
 where counter.failed <> rows_.count
union all
select format('run %s counts %s skipped grades, its failed notes say %s', p.id, p.grades_skipped, rows_.sum)
  from plan as p, lateral (select coalesce(sum(f.grades_per_note), 0) as sum from note_failure as f
                            where f.run_id = p.id and f.status = 'failed') as rows_
 where p.grades_skipped <> rows_.sum
union all
select format('run %s has spent %s + %s USD, its calls say %s + %s', p.id, p.note_cost_usd, p.grade_cost_usd, spent.note, spent.grade)
  from plan as p, lateral (select coalesce(sum(c.cost_usd) filter (where c.kind = 'note'), 0) as note,
                                  coalesce(sum(c.cost_usd) filter (where c.kind = 'grade'), 0) as grade
                             from pgharness.calls as c where c.run_id = p.id) as spent
 where (p.note_cost_usd, p.grade_cost_usd) <> (spent.note, spent.grade)
union all
select format('run %s is %s, and %s of %s notes and %s of %s grades are over', p.id, p.status, p.notes_succeeded + p.notes_failed, p.note_count,
              p.grades_succeeded + p.grades_failed + p.grades_skipped, p.grade_count)
  from plan as p
 where (p.notes_succeeded + p.notes_failed = p.note_count and p.grades_succeeded + p.grades_failed + p.grades_skipped = p.grade_count)
       <> (p.status = 'completed')
   and p.status not in ('failed', 'cancelled')
union all
select format('note %s of run %s is not where the plan has it', n.ordinal, n.run_id)
  from pgharness.notes as n join plan as p on p.id = n.run_id
 cross join lateral pgharness._note_place(p.definition, n.ordinal) as place
 where n.ordinal not between 0 and p.note_count - 1
    or (n.case_number, n.combination_number, n.overlap, n.replication)
       is distinct from (place.case_number, place.combination_number, place.overlap, place.replication)
union all
select format('run %s has %s notes for case %s, combination %s, overlap %s, replication %s',
              n.run_id, count(*), n.case_number, n.combination_number, n.overlap, n.replication)
  from pgharness.notes as n
 group by n.run_id, n.case_number, n.combination_number, n.overlap, n.replication having count(*) > 1
union all
select format('grade %s of run %s is not in the plan', g.ordinal, g.run_id)
  from pgharness.grades as g
 where not exists (select from item as i where i.run_id = g.run_id and i.kind = 'grade' and i.ordinal = g.ordinal and i.is_done)
union all
select format('grade %s of run %s scores %s, its criteria %s', g.ordinal, g.run_id, g.score, parts.score)
  from pgharness.grades as g, lateral (select sum((c ->> 'score')::numeric) as score from jsonb_array_elements(g.criteria) as c) as parts
 where abs(g.score - parts.score) > 0.0001
union all
select format('%s %s of run %s is a failure and not in the plan, or done', f.kind, f.ordinal, f.run_id)
  from pgharness.failures as f
 where not exists (select from item as i where i.run_id = f.run_id and i.kind = f.kind and i.ordinal = f.ordinal and not i.is_done)
union all
select format('%s %s of run %s waits, and the run is completed', f.kind, f.ordinal, f.run_id)
  from pgharness.failures as f join plan as p on p.id = f.run_id where f.status = 'waiting' and p.status = 'completed'
union all
select format('case %s of run %s has another digest now', c.name, rc.run_id)
  from pgharness.run_cases as rc join pgharness.cases as c on c.id = rc.case_id where c.digest <> rc.digest
union all
select format('%s %s says %s %s, which is now %s', name_.at, name_.id, name_.what, name_.said, name_.now)
  from (select 'instance', i.id, 'project', i.project_id, i.project, p.name
          from pgharness.instances as i left join pgharness.projects as p on p.id = i.project_id
        union all select 'instance', i.id, 'experiment', i.experiment_id, i.experiment, e.name
          from pgharness.instances as i left join pgharness.experiments as e on e.id = i.experiment_id
        union all select 'case', c.id, 'dataset', c.dataset_id, c.dataset, d.name
          from pgharness.cases as c left join pgharness.datasets as d on d.id = c.dataset_id
        union all select 'rubric', r.id, 'case', r.case_id, r.case_name, c.name
          from pgharness.rubrics as r left join pgharness.cases as c on c.id = r.case_id
        union all select 'rubric', r.id, 'generator', r.generator_id, r.generator, m.name
          from pgharness.rubrics as r left join pgharness.models as m on m.id = r.generator_id
        union all select 'instance case', ic.case_id, 'instance', ic.instance_id, ic.instance, i.name
          from pgharness.instance_cases as ic left join pgharness.instances as i on i.id = ic.instance_id
        union all select 'instance case', ic.instance_id, 'case', ic.case_id, ic.case_name, c.name
          from pgharness.instance_cases as ic left join pgharness.cases as c on c.id = ic.case_id
        union all select 'combination', mc.id, 'instance', mc.instance_id, mc.instance, i.name
          from pgharness.model_combinations as mc left join pgharness.instances as i on i.id = mc.instance_id
        union all select 'combination', mc.id, 'generator', mc.generator_id, mc.generator, m.name
          from pgharness.model_combinations as mc left join pgharness.models as m on m.id = mc.generator_id
        union all select 'combination', mc.id, 'grader', mc.grader_id, mc.grader, m.name
          from pgharness.model_combinations as mc left join pgharness.models as m on m.id = mc.grader_id
        union all select 'run', r.id, 'instance', r.instance_id, r.instance, i.name
          from pgharness.runs as r left join pgharness.instances as i on i.id = r.instance_id) as name_ (at, id, what, what_id, said, now)
 where (name_.what_id is null) <> (name_.said is null) or name_.said is distinct from name_.now
"""
_ORPHANED_JOBS = """
with job as (
    select j.id, j.status, (j.args ->> 'run_id')::bigint as run_id, j.args ->> 'kind' as kind, (j.args ->> 'epoch')::integer as epoch,
           pgharness._ordinals(j.args) as ordinals
      from procrastinate.procrastinate_jobs as j where j.task_name = 'pgharness.slice'
)
select format('job %s is for run %s, which is %s in epoch %s (the job''s is %s)', j.id, j.run_id, coalesce(r.status, 'not there'), r.epoch, j.epoch)
  from job as j left join pgharness.runs as r on r.id = j.run_id
 where j.status = 'todo' and (r.status is distinct from 'running' or r.epoch <> j.epoch)
union all
select format('job %s is %s', j.id, j.status) from job as j where j.status not in ('todo', 'doing')
union all
select format('nothing is queued for %s %s of run %s', missing.kind, missing.ordinal, missing.run_id)
  from (select r.id as run_id, r.epoch, 'note' as kind, m as ordinal
          from pgharness.runs as r
         cross join lateral pgharness._missing(r.id, 'note', array(select generate_series(0, r.note_count - 1))) as m
         where r.status = 'running'
        union all
        select r.id, r.epoch, 'grade', m
          from pgharness.runs as r
          join pgharness.run_definitions as d on d.run_id = r.id
         cross join lateral pgharness._missing(r.id, 'grade', array(select generate_series(0, r.note_count * d.grade_stride - 1))) as m
         where r.status = 'running') as missing
 where not exists (select from job as j where j.run_id = missing.run_id and j.kind = missing.kind and j.epoch = missing.epoch
                                          and missing.ordinal = any (j.ordinals))
"""
_MISCOUNTED = """
select format('run %s has in call_totals %s, its calls say %s', coalesce(t.run_id, c.run_id), t, c)
  from pgharness.call_totals as t
  full join (select k.run_id, k.model_id, k.kind, k.outcome,
                    case k.kind when 'note' then k.ordinal % d.combination_count when 'grade' then k.ordinal / d.grade_stride % d.combination_count
                                else -1 end::integer as combination_number,
                    count(*) as call_count, sum(k.input_tokens) as input_tokens, sum(k.output_tokens) as output_tokens, sum(k.cached_tokens) as cached_tokens,
                    sum(k.cost_usd) as cost_usd, sum(k.saved_usd) as saved_usd, max(k.started_at) as last_used_at
               from pgharness.calls as k join pgharness.run_definitions as d on d.run_id = k.run_id
              group by 1, 2, 3, 4, 5) as c
    on (c.run_id, c.model_id, c.kind, c.outcome, c.combination_number) = (t.run_id, t.model_id, t.kind, t.outcome, t.combination_number)
 where to_jsonb(t) is distinct from to_jsonb(c)
"""
_TABLES = """
select format('%I.%I', c.relnamespace::regnamespace::text, c.relname)
  from pg_class as c where c.relnamespace::regnamespace::text in ('pgharness', 'procrastinate') and c.relkind = 'r' order by 1
"""


def orphans(db: Database) -> list[str]:
    """Return what is inconsistent in a whole database, in words."""
    with db.transaction():
        db.execute("set local jit = off")  # compiling the query takes seconds, running it milliseconds
        found = db.execute(_ORPHANS).fetchall() + db.execute(_MISCOUNTED).fetchall()
        if value(db, "select to_regclass('procrastinate.procrastinate_jobs') is not null"):
            found += db.execute(_ORPHANED_JOBS).fetchall()
    return [text for (text,) in found]


def miscounted(db: Database) -> list[str]:
    """Return the rows of call_totals that are not what calls say, in words: a part of `orphans`, for any kind of run."""
    return [text for (text,) in db.execute(_MISCOUNTED).fetchall()]


def contents(db: Database) -> dict[str, str]:
    """Return a digest of every table of ours and of the queue's, by table name."""
    digests = " union all ".join(
        f"select '{table}', md5(coalesce(string_agg(t::text, ';' order by t::text), '')) from {table} as t"
        for (table,) in db.execute(_TABLES).fetchall()
    )
    return dict(db.execute(digests.encode()).fetchall())


def clear(db: Database) -> None:
    """Empty a database of all that a test may have put there, the builtins left."""
    for table in ("analyses", "runs", "workers", "logs", "instances", "cases", "datasets", "projects"):
        db.execute(f"delete from pgharness.{table}".encode())
    db.execute("delete from pgharness.experiments where name <> 'note_grade'")
    db.execute("delete from procrastinate.procrastinate_jobs; delete from procrastinate.procrastinate_workers")


@contextmanager
def cloned(server_url: str, template: str) -> Iterator[str]:
    """Make a database like the template and drop it again; yields its connection string."""
    name = f"pgharness_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(make_conninfo(server_url, dbname="postgres"), autocommit=True) as admin:
        admin.execute(f"create database {name} template {template}".encode())
        try:
            yield make_conninfo(server_url, dbname=name)
        finally:
            admin.execute(f"drop database if exists {name} with (force)".encode())


# -- asking


def value(db: Database, query: str, *values: object) -> Any:
    """Return the first value that a query gives."""
    row = db.execute(query.encode(), values or None).fetchone()
    assert row is not None, query
    return row[0]


def rows(db: Database, query: str, *values: object) -> list[Row]:
    """Return what a query gives, as dicts."""
    with db.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode(), values or None).fetchall()


@contextmanager
def refused(db: Database, sqlstate: str, *texts: str) -> Iterator[None]:
    """Expect the block to be refused with one of some states ("23503 23001"), naming every text somewhere in its words."""
    with pytest.raises(psycopg.Error) as caught, db.transaction():
        yield
    said = words(caught.value)
    assert caught.value.sqlstate in sqlstate.split(), f"{caught.value.sqlstate} {said}"
    for text in texts:
        assert text in said, f"{text!r} is not in: {said}"


def words(error: psycopg.Error) -> str:
    """Return all that a server said with an error: message, detail and hint."""
    diag = error.diag
    return " | ".join(text for text in (diag.message_primary, diag.message_detail, diag.message_hint) if text)


# -- defining and starting


def add_cases(
    db: Database,
    count: int,
    *,
    prefix: str = "case",
    authors: Sequence[str] = ("ann", "bob"),
    weights: Sequence[float] = (10, 5),
) -> None:
    """Insert cases `prefix-1..count` with a target and one accepted rubric per author."""
    db.execute(
        "insert into pgharness.cases (name, input, target) select format('%%s-%%s', %s::text, i), to_jsonb('input ' || i), to_jsonb(i::text)"
        " from generate_series(1, %s) as i",
        (prefix, count),
    )
    criteria = json.dumps([{"criterion": f"criterion {n}", "weight": weight} for n, weight in enumerate(weights)])
    db.execute(
        "insert into pgharness.rubrics (case_name, author, validation, criteria)"
        " select format('%%s-%%s', %s::text, i), a, 'accepted', %s from generate_series(1, %s) as i, unnest(%s::text[]) as a",
        (prefix, criteria, count, list(authors)),
    )


def add_instance(
    db: Database,
    name: str = "trial",
    *,
    cases: int = 2,
    combinations: Sequence[tuple[str, str | None]] = (("simulator", "simulator"),),
    **columns: object,
) -> None:
    """Insert an instance with `cases` cases of its own, two authors' rubrics each, and its combinations."""
    fields = {"name": name, "experiment": "note_grade"} | columns
    names, marks = ", ".join(fields), ", ".join(["%s"] * len(fields))
    db.execute(f"insert into pgharness.instances ({names}) values ({marks})".encode(), list(fields.values()))
    if cases:
        add_cases(db, cases, prefix=name)
        chosen = [f"{name}-{i}" for i in range(1, cases + 1)]
        db.execute("select pgharness.add_cases(%s, names => %s)", (name, chosen))
    for number, (generator, grader) in enumerate(combinations):
        db.execute(
            "insert into pgharness.model_combinations (instance, name, generator, grader) values (%s, %s, %s, %s)",
            (name, f"combination {number}", generator, grader),
        )


def start(db: Database, instance: str = "trial", **arguments: object) -> int:
    """Start a run and return its id."""
    named = "".join(f", {name} => %s" for name in arguments)
    return int(value(db, f"select run_id from pgharness.start_run(%s{named})", instance, *arguments.values()))


def run_of(db: Database, run: int) -> Row:
    """Return a run's row."""
    return rows(db, "select * from pgharness.runs where id = %s", run)[0]


# -- working


def register(db: Database, host: str = "host", pid: int = 1) -> int:
    """Register a worker process, with the queue too; return its id."""
    worker = int(value(db, "select pgharness.register_worker(%s, %s, '0.1.0', '{note,grade}', 10)", host, pid))
    db.execute(
        "select pgharness.attach_queue_worker(%s, (select worker_id from procrastinate.procrastinate_register_worker_v1()))",
        (worker,),
    )
    return worker


def jobs(db: Database, *, status: str = "todo", kind: str = "%") -> list[Row]:
    """Return the queue's jobs with their arguments, in the order in which they were queued."""
    return rows(
        db,
        "select id, queue_name, priority, args, status::text, scheduled_at, worker_id from procrastinate.procrastinate_jobs"
        " where status::text = %s and args ->> 'kind' like %s order by id",
        status,
        kind,
    )


def ordinals(job: Row) -> list[int]:
    """Return the items that a job names."""
    args = job["args"]
    return args["ordinals"] if "ordinals" in args else list(range(args["first"], args["last"] + 1))


def take(db: Database, worker: int) -> Row | None:
    """Fetch the next job as a worker does; None when nothing is due."""
    found = rows(
        db,
        "select j.id, j.args from procrastinate.procrastinate_fetch_job_v2('{note,grade}',"
        " (select queue_worker_id from pgharness.workers where id = %s)) as j where j.id is not null",
        worker,
    )
    return found[0] if found else None


def finish(db: Database, job: Row) -> None:
    """End a job as a worker does."""
    db.execute("select procrastinate.procrastinate_finish_job_v1(%s, 'succeeded', true)", (job["id"],))


def load(db: Database, worker: int, slice_: Row) -> list[Row]:
    """Return what a slice (a job's arguments) still has to do."""
    return rows(db, "select * from pgharness.load_slice(%s, %s)", worker, json.dumps(slice_))


def record(db: Database, worker: int, *outcomes: Row) -> list[Row]:
    """Record outcomes; returns what the worker learns about their runs."""
    return rows(db, "select * from pgharness.record_outcomes(%s, %s)", worker, json.dumps(outcomes))


def call(cost: float = 0.5, **fields: object) -> Row:
    """Return one call to the model, as a worker reports it."""
    return {
        "model_id": 5,
        "outcome": "succeeded",
        "cost_usd": cost,
        "input_tokens": 10,
        "output_tokens": 5,
        "latency_ms": 12.5,
        "started_at": f"2026-01-01T00:00:00.{next(_TRIES) % 1_000_000:06}Z",
    } | fields


def note(run: int, ordinal: int, **fields: object) -> Row:
    """Return the outcome of a note that succeeded."""
    known = {"run_id": run, "kind": "note", "ordinal": ordinal, "attempt": 1, "result": "succeeded"}
    return known | {"output": f"note {ordinal}", "calls": [call()]} | fields


def grade(run: int, ordinal: int, *satisfactions: float, **fields: object) -> Row:
    """Return the outcome of a grade that succeeded, by default with the two verdicts that `add_cases` asks for."""
    verdicts = [{"rationale": "because", "satisfaction": s} for s in satisfactions or (50, 100)]
    known = {"run_id": run, "kind": "grade", "ordinal": ordinal, "attempt": 1, "result": "succeeded"}
    return known | {"verdicts": verdicts, "calls": [call(0.25)]} | fields


def failure(run: int, kind: str, ordinal: int, **fields: object) -> Row:
    """Return the outcome of a try that failed: by default one that spends an attempt and may be tried again.

    Every one is a new try; the same dictionary sent twice is the same try.
    """
    known = {
        "run_id": run,
        "kind": kind,
        "ordinal": ordinal,
        "attempt": next(_TRIES),
        "result": "failed",
        "cause": "server_error",
        "error": "status 500",
    }
    return known | {"is_retryable": True, "spends_attempt": True, "calls": [call(0, outcome="server_error")]} | fields


def lost(run: int, kind: str, ordinal: int) -> Row:
    """Return the outcome of a try that failed for good."""
    return failure(run, kind, ordinal, cause="rejected", error="status 400", is_retryable=False)


def succeeded(slice_: Row, items: Sequence[Row]) -> list[Row]:
    """Return outcomes that say that all items of a slice succeeded."""
    if slice_["kind"] == "note":
        return [note(slice_["run_id"], item["ordinal"]) for item in items]
    by_target = {"verdicts": None, "score": 1, "max_score": 1}
    return [grade(slice_["run_id"], item["ordinal"], **({} if item["rubric_id"] else by_target)) for item in items]


def work_off(db: Database, worker: int, *, at_most: int = 1_000_000) -> int:
    """Do what is due in the queue, successfully; return how many items were done."""
    done = 0
    while done < at_most and (job := take(db, worker)) is not None:
        items = load(db, worker, job["args"])
        record(db, worker, *succeeded(job["args"], items))
        finish(db, job)
        done += len(items)
    return done
