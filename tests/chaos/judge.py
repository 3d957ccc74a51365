"""The verdict on a database after the storm: what is missing, stuck, left over or leaked, in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psycopg
from hosts import Host
from load import Conductor, Row
from watch import worker_connections

from pgharness.database import WORKER_CONNECTIONS
from world import orphans

_RUNS = """
select r.id, r.name, r.instance, r.status, r.reason, r.note_count, r.notes_succeeded, r.notes_failed,
       (select count(*) from pgharness.notes as n where n.run_id = r.id) as notes,
       r.grade_count, r.grades_succeeded, r.grades_failed, r.grades_skipped,
       (select count(*) from pgharness.grades as g where g.run_id = r.id) as grades
  from pgharness.runs as r order by r.id
"""
_LEFT_OVER = {
    "an item failed or waits": "select * from pgharness.failed_items order by run_id, kind, ordinal",
    "work is stalled": "select * from pgharness.stalled_work",
    "an item is outstanding": "select * from pgharness.outstanding_items limit 100",
    "a job is left in the queue": "select id, status, attempts, scheduled_at, worker_id, args from procrastinate.procrastinate_jobs order by id",
    "a transaction is idle": "select pid, application_name, client_addr, state, state_change, left(query, 200) as query from pg_stat_activity"
    " where datname = current_database() and state like 'idle in transaction%'",
}
_TEMPORARY = ("a job is left in the queue", "a transaction is idle")  # for a few seconds they may be there
_DUPLICATES = """
select count(*) as items, coalesce(sum(calls), 0)::bigint as calls, count(*) filter (where calls > 1) as items_asked_again,
       coalesce(sum(calls - 1), 0)::bigint as calls_repeated, coalesce(max(calls), 0) as most_calls_of_an_item
  from (select count(*) as calls from pgharness.calls where outcome = 'succeeded' group by run_id, kind, ordinal) as item
"""


def wait_for_calm(conductor: Conductor, step: Callable[[], None], *, patience: float, limit: float) -> bool:
    """Return whether every run is completed, as soon as that is so; False when nothing moves for too long, or at the limit."""
    query = (
        "select count(*) filter (where status <> 'completed' or notes_failed + grades_failed > 0) as open,"
        " sum(notes_succeeded + grades_succeeded) as done from pgharness.runs"
    )
    begun = moved = time.monotonic()
    last: Row = {}
    while True:
        step()
        try:
            now = conductor.rows(query)[0]
        except psycopg.OperationalError:
            now = last
        if now and not now["open"]:
            return True
        if now != last:
            last, moved = now, time.monotonic()
        if time.monotonic() - moved > patience or time.monotonic() - begun > limit:
            return False
        time.sleep(0.2)


def wait_for(condition: Callable[[], bool], step: Callable[[], None], seconds: float) -> bool:
    """Return whether a condition holds within so many seconds, as soon as it does."""
    deadline = time.monotonic() + seconds
    while True:
        step()
        try:
            if condition():
                return True
        except psycopg.OperationalError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def not_at_work(conductor: Conductor, host: Host) -> list[str]:
    """Return which processes of a host are missing, or not at work as the database sees them."""
    fresh = {
        row["pid"]
        for row in conductor.rows(
            "select pid from pgharness.workers where status = 'running' and queue_worker_id is not null"
            " and heartbeat_at > pgharness.clock() - interval '10 seconds'"
        )
    }
    workers = host.workers
    wrong = [f"worker process {pid} on {host.name} is not at work" for pid in workers if pid not in fresh]
    if len(workers) != host.process_count:
        wrong.append(f"{host.name} has {len(workers)} of {host.process_count} worker processes")
    return wrong


def has_recorded(conductor: Conductor, host: Host, seconds: float) -> bool:
    """Tell whether calls that each worker process of a host began in the last so many seconds are recorded."""
    found = conductor.rows(
        "select distinct w.pid from (select c.worker_id, c.started_at from pgharness.calls as c order by c.id desc limit 2000) as latest"
        " join pgharness.workers as w on w.id = latest.worker_id"
        " where latest.started_at > clock_timestamp() - make_interval(secs => %s)",
        seconds,
    )
    return {row["pid"] for row in found} >= set(host.workers)


def workers_amiss(conductor: Conductor, hosts: Sequence[Host]) -> list[str]:
    """Return what is wrong with the workers: processes that are not at work, rows alive without a process."""
    rows = conductor.rows(
        "select id, host, pid, status, heartbeat_at from pgharness.workers where status in ('running', 'draining')"
    )
    members = {pid for host in hosts for pid in host.members}
    wrong = [text for host in hosts for text in not_at_work(conductor, host)]
    return wrong + [f"worker row without a process: {row}" for row in rows if row["pid"] not in members]


def _is_empty(conductor: Conductor, query: str) -> bool:
    return not conductor.rows(query)


def verdict(conductor: Conductor, hosts: Sequence[Host], step: Callable[[], None], *, patience: float) -> list[str]:
    """Return all that is wrong while the workers still run; what passes may take so many seconds to do so."""
    problems = []
    conductor.connection.execute("set statement_timeout = 0")
    for run in conductor.rows(_RUNS):
        is_whole = run["notes"] == run["notes_succeeded"] == run["note_count"]
        is_whole = is_whole and run["grades"] == run["grades_succeeded"] == run["grade_count"]
        if run["status"] != "completed" or not is_whole:
            problems.append(f"run {run['id']} is not whole: {run}")
    for what, query in _LEFT_OVER.items():
        wait_for(partial(_is_empty, conductor, query), step, patience if what in _TEMPORARY else 0)
        if rows := conductor.rows(query):
            problems.append(f"{what} ({len(rows)}): {rows[:5]}")
    problems += orphans(conductor.connection)[:20]
    wait_for(lambda: not workers_amiss(conductor, hosts), step, patience)
    problems += workers_amiss(conductor, hosts)
    allowed = sum(host.process_count * WORKER_CONNECTIONS for host in hosts)
    wait_for(lambda: sum(worker_connections(conductor.connection).values()) <= allowed, step, patience)
    counts = worker_connections(conductor.connection)
    if sum(counts.values()) > allowed:
        problems.append(f"workers hold {dict(counts)} connections, more than {allowed}")
    return problems


def verdict_after_end(conductor: Conductor, hosts: Sequence[Host], *, patience: float) -> list[str]:
    """Return all that is wrong once every supervisor was asked to end."""
    problems = []
    for host in hosts:
        host.drain()
    if not wait_for(lambda: not any(host.members for host in hosts), lambda: None, patience):
        problems += [f"processes of {host.name} do not end: {host.members}" for host in hosts if host.members]
    problems += [
        f"the supervisor on {host.name} ended with status {host.status}:\n{host.tail()}"
        for host in hosts
        if host.status != 0
    ]
    if not wait_for(lambda: not worker_connections(conductor.connection), lambda: None, patience):
        problems.append(f"connections outlive their workers: {dict(worker_connections(conductor.connection))}")
    alive = "select id, host, pid, status, heartbeat_at from pgharness.workers where status in ('running', 'draining')"
    if rows := conductor.rows(alive):
        problems.append(f"workers count as alive that have ended: {rows}")
    return problems + orphans(conductor.connection)[:20]


def facts(conductor: Conductor) -> dict[str, Any]:
    """Return how much was done, and how much of it more than once."""
    runs = conductor.rows(
        "select count(*) as runs, sum(note_count) as notes, sum(grade_count) as grades, sum(epoch) as requeues from pgharness.runs"
    )[0]
    outcomes = conductor.rows("select outcome, count(*) from pgharness.calls group by 1 order by 2 desc")
    workers = conductor.rows("select status, count(*) from pgharness.workers group by 1")
    leases = conductor.rows(
        "select (select count(*) from procrastinate.procrastinate_workers) as queue_workers,"
        " (select count(*) from pgharness.model_leases) as model_leases, (select count(*) from pgharness.run_leases) as run_leases"
    )[0]
    return {
        **{name: int(value) for name, value in runs.items()},
        "outcomes": {row["outcome"]: row["count"] for row in outcomes},
        "duplicates": conductor.rows(_DUPLICATES)[0],
        "workers": {row["status"]: row["count"] for row in workers},
        "left": leases,
    }
