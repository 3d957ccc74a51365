"""The work that the storm interferes with: simulated models with faults, many kinds of runs, and people who control them.

A conductor keeps enough runs going that there is always work, and pauses, cancels, resumes, retries, requeues and
reruns some of them. When it is told to calm down it lets all of them end: nothing stays paused, cancelled or failed.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import dict_row

Row = dict[str, Any]
Tell = Callable[[str], None]
CASE_COUNT = 20
AUTHORS = ("ann", "bob")
FAULTS = {"rate_limit_rate": 0.05, "error_rate": 0.02, "retry_after_seconds": 0.7}
_TALK = (
    ("Doctor", "Good morning, what has brought you here today, and how long has it been going on?"),
    ("Patient", "I have had a cough for nine days, and since Tuesday a fever of up to 38.7 degrees."),
    ("Doctor", "Any other conditions, regular medicines or allergies that I should know of?"),
    ("Patient", "Mild asthma with a salbutamol inhaler, and penicillin gave me a rash as a child."),
    ("Doctor", "This is most likely pneumonia. I suggest doxycycline for five days and a chest film."),
)
_CRITERIA = (
    {"criterion": "Records the cough of nine days with fever up to 38.7 degrees.", "weight": 30},
    {"criterion": "Records the asthma and the allergy to penicillin.", "weight": 30},
    {"criterion": "Records doxycycline for five days and the chest film.", "weight": 40},
)
_MODELS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"parameters": {"latency_seconds": 0.05, "latency_spread": 0.8}},
    "even": {"parameters": {"latency_seconds": 0.3, "latency_spread": 0.3}},
    "slow": {"parameters": {"latency_seconds": 1.5, "latency_spread": 0.5}},
    "limited": {
        "parameters": {"latency_seconds": 0.2, "latency_spread": 0.5},
        "max_concurrency": 6,
        "requests_per_minute": 900,
    },
    "fragile": {
        "parameters": {"latency_seconds": 0.1, "invalid_rate": 0.08, "refusal_rate": 0.08, "timeout_rate": 0.01},
        "timeout_seconds": 2,
    },
    "priced": {
        "parameters": {"latency_seconds": 0.1},
        "input_usd_per_million": 3,
        "output_usd_per_million": 15,
    },
}


class Kind(NamedTuple):
    """One kind of run: its instance, how often it is chosen, and what sizes it is started in."""

    name: str
    share: int
    cases: int
    pairs: tuple[tuple[str, str | None], ...]
    replications: tuple[int, ...]
    columns: Mapping[str, Any] = {}
    arguments: Mapping[str, Any] = {}


KINDS = (
    Kind("pairs", 4, 10, (("quick", "even"), ("even", "quick")), (1, 3, 6)),
    Kind("rubrics", 3, 6, (("quick", "quick"),), (2, 4), {"grade_replications": 3}),
    Kind("targets", 2, 20, (("even", "exact_match"),), (2, 5), {"rubrics_per_case": 0}),
    Kind("notes", 2, 20, (("quick", None),), (2, 10, 20), {"cycle_transcript_overlaps": [0, 100]}),
    Kind("slow", 2, 10, (("slow", "even"),), (1, 2)),
    Kind("limited", 2, 10, (("limited", "limited"),), (1, 2)),
    Kind("fragile", 2, 10, (("fragile", "fragile"),), (1, 3), {"max_attempts": 2, "failure_threshold": 0.05}),
    Kind("priced", 1, 10, (("priced", "priced"),), (2,), {}, {"budget_usd": 0.06}),
    Kind("capped", 1, 10, (("quick", "quick"),), (3,), {}, {"max_concurrency": 5}),
)
_CONTROLS = {"pause": 3, "cancel": 3, "requeue": 1, "retry": 2, "adjust": 2, "rerun": 1}
_ITEMS_AHEAD = 600  # notes and grades left in running runs, below which another run is started
_LOOK_SECONDS = 0.3
_WRONG_STATE = "PH003"  # the run ended meanwhile, as it may


def define(connection: psycopg.Connection[Any]) -> None:
    """Insert models, cases, rubrics and instances."""
    for name, columns in _MODELS.items():
        parameters = {"latency_spread": 0.5} | FAULTS | columns["parameters"]
        _insert(connection, "models", {"name": name, "provider": "simulator", **columns, "parameters": parameters})
    for number in range(1, CASE_COUNT + 1):
        name = f"case-{number}"
        talk = [
            {"speaker": speaker, "text": text} for speaker, text in (*_TALK, ("Patient", f"My number is {number}."))
        ]
        _insert(connection, "cases", {"name": name, "input": talk, "target": str(number)})
        for author in AUTHORS:
            rubric = {"case_name": name, "author": author, "validation": "accepted", "criteria": list(_CRITERIA)}
            _insert(connection, "rubrics", rubric)
    for kind in KINDS:
        columns = {"name": kind.name, "experiment": "note_grade", "retry_delay_seconds": 0.5}
        _insert(connection, "instances", {**columns, **kind.columns})
        names = [f"case-{number}" for number in range(1, kind.cases + 1)]
        connection.execute("select pgharness.add_cases(%s, names => %s)", (kind.name, names))
        for generator, grader in kind.pairs:
            pair = {"instance": kind.name, "generator": generator, "grader": grader}
            _insert(connection, "model_combinations", pair)


def _insert(connection: psycopg.Connection[Any], table: str, columns: Mapping[str, Any]) -> None:
    jsonb = {"parameters", "input", "target", "criteria"}
    values = [json.dumps(value) if name in jsonb else value for name, value in columns.items()]
    marks = ", ".join(["%s"] * len(columns))
    connection.execute(f"insert into pgharness.{table} ({', '.join(columns)}) values ({marks})".encode(), values)


class Conductor:
    """Starts runs and interferes with them; what it wants next it reads from the database, which may be away."""

    def __init__(self, url: str, rng: random.Random, tell: Tell) -> None:
        self._url = url
        self._rng = rng
        self._tell = tell
        self._connection: psycopg.Connection[Any] | None = None
        self._resume_at: dict[int, float] = {}
        self._next_look = 0.0
        self._next_control = time.monotonic() + 5
        self._starts = 0
        self.is_calm = False
        self.controls: Counter[str] = Counter()
        self.problems: list[str] = []

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """An autocommit connection, a new one when the last one broke. Raises OperationalError while there is no server."""
        if self._connection is None or self._connection.closed or self._connection.broken:
            self._connection = psycopg.connect(
                self._url,
                autocommit=True,
                connect_timeout=5,
                application_name="chaos",
                options="-c statement_timeout=30s",
                prepare_threshold=None,
            )
        return self._connection

    def rows(self, query: str, *values: object) -> list[Row]:
        with self.connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode(), values or None).fetchall()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def step(self) -> None:
        """Do what is due; does nothing while there is no server."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        try:
            runs = self.rows(
                "select id, instance, status, max_concurrency, notes_failed + grades_failed as failed,"
                " note_count + grade_count - notes_succeeded - notes_failed"
                " - grades_succeeded - grades_failed - grades_skipped as left"
                " from pgharness.runs where status <> 'completed' or notes_failed + grades_failed > 0 order by id"
            )
            for run in runs:
                self._tend(run)
            if self.is_calm:
                return
            running = [run for run in runs if run["status"] == "running"]
            if sum(run["left"] for run in running) < _ITEMS_AHEAD:
                self._start()
            if running and time.monotonic() > self._next_control:
                self._next_control = time.monotonic() + self._rng.uniform(2, 6)
                self._interfere(self._rng.choice(running)["id"])
        except psycopg.errors.QueryCanceled as exc:
            self._report(f"a statement of the conductor took more than 30 s: {exc}")
        except (psycopg.OperationalError, psycopg.InterfaceError) as exc:
            if exc.sqlstate in ("40P01", "40001"):
                self._report(f"the conductor was refused: {exc}")
        except psycopg.Error as exc:
            self._report(f"the conductor was refused: {exc}")

    def calm_down(self) -> None:
        """Interfere no more; what is paused, cancelled or failed goes on."""
        self.is_calm = True
        self._resume_at.clear()

    def _report(self, problem: str) -> None:
        self.problems.append(problem)
        self._tell(f"PROBLEM: {problem}")

    def _tend(self, run: Row) -> None:
        """Let a run that stopped go on, when its time has come."""
        run_id = run["id"]
        if run["status"] in ("paused", "cancelled"):
            if time.monotonic() >= self._resume_at.get(run_id, 0):
                self._control("resume_run", run_id, **({"budget_usd": 100.0} if run["instance"] == "priced" else {}))
                self._resume_at.pop(run_id, None)
        elif run["status"] == "failed" or (run["status"] == "completed" and run["failed"]):
            self._control("retry_failed", run_id)
        elif self.is_calm and run["status"] == "running" and run["max_concurrency"]:
            self._control("adjust_run", run_id, max_concurrency=0)

    def _control(self, function: str, run_id: int, **arguments: object) -> None:
        named = "".join(f", {name} => %s" for name in arguments)
        try:
            self.rows(f"select pgharness.{function}(%s::bigint{named})", run_id, *arguments.values())
        except psycopg.Error as exc:
            if exc.sqlstate != _WRONG_STATE:
                raise
            self.controls["refused, for the run was in another state by then"] += 1
        else:
            self.controls[function] += 1

    def _start(self) -> None:
        kind = self._rng.choices(KINDS, [each.share for each in KINDS])[0]
        replications = self._rng.choice(kind.replications)
        self._starts += 1
        named = "".join(f", {name} => %s" for name in kind.arguments)
        connection = self.connection
        with connection.transaction():
            connection.execute(
                "update pgharness.instances set note_replications = %s, seed = seed + 1 where name = %s",
                (replications, kind.name),
            )
            connection.execute(
                f"select pgharness.start_run(%s, idempotency_key => %s{named})".encode(),
                (kind.name, f"chaos-{self._starts}", *kind.arguments.values()),
            )
        self.controls["start_run"] += 1

    def _interfere(self, run_id: int) -> None:
        """Do to a running run what people do."""
        control = self._rng.choices(list(_CONTROLS), list(_CONTROLS.values()))[0]
        if control in ("pause", "cancel"):
            self._resume_at[run_id] = time.monotonic() + self._rng.uniform(1, 10)
            self._control(f"{control}_run", run_id)
        elif control == "requeue":
            self._control("requeue_run", run_id)
        elif control == "retry":
            self._control("retry_failed", run_id)
        elif control == "adjust":
            self._control(
                "adjust_run", run_id, priority=self._rng.randint(-3, 3), max_concurrency=self._rng.choice((0, 8))
            )
        else:
            self._control("rerun", run_id, idempotency_key=f"again-{run_id}")
