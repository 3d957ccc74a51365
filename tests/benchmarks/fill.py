"""Fill a database with a run of a million notes, as it looks near its end, without doing the work.

    fill.py URL                                        1,000,000 notes, 2,000,000 grades, 3,030,000 calls: minutes
    fill.py URL --notes 100000 --grades-per-note 1     less of it

It installs the schema where that is missing, defines an instance named `bench`, starts a run of it, and writes the first
notes of its plan straight into the tables, with their grades and calls, values as wide as real ones; the run's counters
and the queue then are as if workers had done it. A fiftieth of the plan is left to do, a few notes of it failed. The role
must be a superuser, since the rows go in without the checks of foreign keys. It prints the run and the sizes as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from bed import CRITERIA, NOTE, connected, make_world, scalar
from psycopg import Connection, sql

from pgharness import schema

COMBINATIONS = 2
REPLICATIONS = 50  # written; one more is planned
_NOTES_PER_CASE = COMBINATIONS * REPLICATIONS
_FAILED_NOTES = 200
_CALLS_PER_SECOND = 2_000  # the pace at which the calls seem to have been made: 1,000 in flight, 0.5 s each
_SATISFACTIONS = 101

# Replications vary slowest in a plan, so the first ordinals are whole replications. Work seems to have begun {seconds} ago.
_NOTES = """
insert into pgharness.notes (run_id, ordinal, case_number, combination_number, overlap, replication, attempts, output, created_at)
select d.run_id, o, place.case_number, place.combination_number, place.overlap, place.replication,
       1 + (o % 101 = 0)::integer, to_jsonb({note} || o), now() - make_interval(secs => {seconds} * (1 - o / {notes}::double precision))
  from pgharness.run_definitions as d
 cross join generate_series(0, {notes} - 1) as o
 cross join lateral pgharness._note_place(d, o) as place
 where d.run_id = {run_id}
"""

# One grade in so many distinct ones, made before: the same four criteria, each satisfied to another degree.
_VERDICTS = """
create temporary table verdicts as
select place::integer as place, sum(score) as score, sum(weight) as max_score,
       jsonb_agg(jsonb_build_object('rationale', {rationale}::text, 'satisfaction', satisfaction, 'score', score) order by number) as criteria
  from generate_series(0, {satisfactions} - 1) as place
 cross join lateral (
       select c.number, (c.value ->> 'weight')::numeric as weight, (place * c.number) % {satisfactions} as satisfaction,
              round((c.value ->> 'weight')::numeric * ((place * c.number) % {satisfactions}) / 100, 2) as score
         from jsonb_array_elements({criteria}::jsonb) with ordinality as c (value, number)) as part
 group by place;
analyze verdicts
"""

_GRADES = """
insert into pgharness.grades (run_id, note_ordinal, rubric_number, replication, ordinal, rubric_id, attempts, score, max_score, criteria, created_at)
select n.run_id, n.ordinal, rr.number, 1, n.ordinal * {grades_per_note} + rr.number - 1, rr.rubric_id,
       1 + ((n.ordinal * 2 + rr.number) % 101 = 50)::integer, v.score, v.max_score, v.criteria,
       least(n.created_at + interval '1 second' * rr.number, now())
  from pgharness.notes as n
  join pgharness.run_rubrics as rr on rr.run_id = n.run_id and rr.case_number = n.case_number
  join verdicts as v on v.place = (n.ordinal * 37 + rr.number * 11 + n.case_number) % {satisfactions}
 where n.run_id = {run_id}
"""

# Every item had a call that succeeded; one in a hundred had another before it, which a rate limit or an error ended.
_CALLS = """
with item as (
    select 'note' as kind, n.ordinal, n.combination_number, n.attempts, n.created_at from pgharness.notes as n where n.run_id = {run_id}
     union all
    select 'grade', g.ordinal, n.combination_number, g.attempts, g.created_at
      from pgharness.grades as g join pgharness.notes as n on n.run_id = g.run_id and n.ordinal = g.note_ordinal where g.run_id = {run_id}
)
insert into pgharness.calls (run_id, kind, ordinal, attempt, model_id, worker_id, outcome, error, http_status, finish_reason, request_id,
                             answered_by, input_tokens, output_tokens, cached_tokens, cost_usd, latency_ms, started_at)
select c.run_id, item.kind, item.ordinal, attempt, case item.kind when 'note' then c.generator_id else c.grader_id end, {worker_id},
       case when is_last then 'succeeded' when item.ordinal % 3 = 0 then 'server_error' else 'rate_limited' end,
       case when not is_last then 'the provider answered: try again later' end,
       case when is_last then 200 when item.ordinal % 3 = 0 then 500 else 429 end, case when is_last then 'stop' end,
       'req-' || item.ordinal, 'simulated-2026-01', 300 + item.ordinal % 50, (130 + item.ordinal % 70) * is_last::integer, 0,
       (0.0012 + item.ordinal % 70 * 0.00001) * is_last::integer, latency,
       item.created_at - make_interval(secs => latency / 1000 + 3 * (item.attempts - attempt))
  from item
  join pgharness.run_combinations as c on c.run_id = {run_id} and c.number = item.combination_number
 cross join lateral generate_series(1, item.attempts) as attempt
 cross join lateral (select attempt = item.attempts as is_last, 400 + (item.ordinal * 7919 % 1000) / 5.0 as latency) as how
 order by item.created_at
"""

_FAILURES = """
insert into pgharness.failures (run_id, kind, ordinal, status, attempts, tries, cause, error, answer)
select {run_id}, 'note', {notes} + i, 'failed', 3, 3, 'invalid_output', 'the model answered nothing', '' from generate_series(0, {failed} - 1) as i
"""

_COUNTERS = """
update pgharness.runs as r
   set notes_succeeded = {notes}, grades_succeeded = {notes} * {grades_per_note}, notes_failed = {failed}, grades_skipped = {failed} * {grades_per_note},
       note_cost_usd = spent.note, grade_cost_usd = spent.grade,
       created_at = now() - make_interval(secs => {seconds}), activated_at = now() - make_interval(secs => {seconds})
  from (select sum(c.cost_usd) filter (where c.kind = 'note') as note, sum(c.cost_usd) filter (where c.kind = 'grade') as grade
          from pgharness.calls as c where c.run_id = {run_id}) as spent
 where r.id = {run_id}
"""


def fill(connection: Connection[Any], *, notes: int = 1_000_000, grades_per_note: int = 2) -> int:
    """Write a run of so many notes (rounded up to a hundred) that is nearly done; return its id."""
    cases = -(-notes // _NOTES_PER_CASE)
    notes = cases * _NOTES_PER_CASE
    make_world(connection, latency=0.5, cases=cases, authors=grades_per_note, combinations=COMBINATIONS)
    connection.execute(
        "update pgharness.instances set note_replications = %s where name = 'bench'", (REPLICATIONS + 1,)
    )
    run_id = int(scalar(connection, "select run_id from pgharness.start_run('bench')"))
    worker_id = scalar(connection, "select pgharness.register_worker('bench', 0, '', '{note,grade}', 1000)")
    connection.execute("update pgharness.workers set status = 'stopped' where id = %s", (worker_id,))
    values = {
        "run_id": run_id,
        "worker_id": worker_id,
        "notes": notes,
        "grades_per_note": grades_per_note,
        "failed": min(_FAILED_NOTES, notes // REPLICATIONS // 2),
        "seconds": notes * (1 + grades_per_note) / _CALLS_PER_SECOND,
        "note": NOTE,
        "rationale": "The note says so, in its first and in its last line, and nothing that it says is against it.",
        "criteria": json.dumps(CRITERIA),
        "satisfactions": _SATISFACTIONS,
    }
    for statement in (_NOTES, _VERDICTS, _GRADES, _CALLS, _FAILURES, _COUNTERS):
        # six million checks of foreign keys would take minutes; calls have none, and are counted by a trigger
        role = "origin" if statement is _CALLS else "replica"
        connection.execute(f"set session_replication_role = {role}")
        connection.execute(sql.SQL(statement).format(**{k: sql.Literal(v) for k, v in values.items()}))
    connection.execute("drop table verdicts")
    connection.execute("reset session_replication_role")
    connection.execute("insert into pgharness.run_workers (run_id, worker_id) values (%s, %s)", (run_id, worker_id))
    connection.execute("select from pgharness.requeue_run(%s)", (run_id,))  # its jobs are now those of the rest
    connection.execute("vacuum analyze")
    while scalar(connection, "select pgharness.settle_scores()"):  # as workers would have
        connection.execute(
            "vacuum analyze pgharness.settled_scores, pgharness.settled_note_scores, pgharness.settled_pairs"
        )
    connection.execute("vacuum analyze")
    connection.execute("checkpoint")
    _check(connection, run_id, notes, notes * grades_per_note)
    return run_id


def _check(connection: Connection[Any], run_id: int, notes: int, grades: int) -> None:
    """Raise if the harness does not see the run as filled: its tables have changed, and this program has not."""
    seen = connection.execute(
        "select status, notes_succeeded, grades_succeeded from pgharness.run_progress where run_id = %s", (run_id,)
    ).fetchone()
    if seen != ("running", notes, grades):
        raise RuntimeError(f"run_progress shows {seen}, not ('running', {notes}, {grades})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a database to fill, by a superuser")
    parser.add_argument("--notes", type=int, default=1_000_000)
    parser.add_argument("--grades-per-note", type=int, default=2, help="rubrics a case, each by another author")
    options = parser.parse_args()
    begun = time.monotonic()
    with connected(options.url) as connection:
        schema.upgrade(connection)
        run_id = fill(connection, notes=options.notes, grades_per_note=options.grades_per_note)
        tables = connection.execute(
            "select c.relname, c.reltuples::bigint, pg_total_relation_size(c.oid) / 1024 ^ 2 from pg_class as c "
            "where c.oid = any ('{pgharness.notes,pgharness.grades,pgharness.calls}'::regclass[])"
        ).fetchall()
    sizes = {name: {"rows": rows, "mib": round(mib)} for name, rows, mib in tables}
    print(json.dumps({"run_id": run_id, "seconds": round(time.monotonic() - begun, 1)} | sizes))


if __name__ == "__main__":
    main()
