"""The clinical experiment runner's tables, built here with everything ugly that such tables hold, import whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.sql import SQL, Identifier, Placeholder

import world
from pgharness import database
from pgharness.clinical_runner import ClinicalReport, import_clinical_runner
from pgharness.errors import DatabaseError, ImportRefused, WrongState

KEYS = {
    "openai": "sk-live-0123456789abcdefOPENAI",
    "second": "sk-live-second+key/with$signs",
    "anthropic": "sk-ant-anthropic-key-123",
}
START = datetime(2025, 9, 1, 8, 0, 0)

# table: its columns beside id; the timestamps have no zone, json is not jsonb, as in the original
TABLES = {
    "contributor": "created timestamp, email text unique",
    "case": """created timestamp not null, updated timestamp not null, name text not null unique,
        transcript json not null, limited_chart json not null, profile text not null,
        validation_status {case_status} not null, batch_identifier text not null, tags json not null""",
    "real_world_case": """created timestamp, case_id integer references {case} on delete cascade unique,
        customer_identifier text, patient_note_hash text, publishable boolean, start_time real, end_time real,
        duration real, audio_llm_name text""",
    "synthetic_case": """created timestamp, case_id integer references {case} on delete cascade unique, category text,
        turn_total integer, speaker_sequence json, mood text[], temperature real""",
    "case_provenance": """created timestamp, author text, case_id integer references {case} on delete cascade,
        provenance_type text""",
    "generated_note": """created timestamp, case_id integer, note_json json, token_counts json,
        transcript2instructions json""",
    "rubric": """created timestamp not null, updated timestamp not null,
        case_id integer references {case} on delete cascade, parent_rubric_id integer, validation_timestamp timestamp,
        validation {rubric_validation} not null, author text, rubric json not null,
        case_provenance_classification text not null, comments text not null, text_llm_vendor text not null,
        text_llm_name text not null, temperature real not null""",
    "score": """created timestamp, rubric_id integer references {rubric} on delete cascade, generated_note_id integer,
        scoring_result json, overall_score real""",
    "model": """created timestamp not null, updated timestamp not null, vendor text not null, api_key text not null,
        model text not null""",
    "experiment": """created timestamp not null, updated timestamp not null, name text not null unique,
        hyperscribe_version text not null, cycle_times json not null, cycle_transcript_overlaps json not null,
        note_replications integer not null, grade_replications integer not null""",
    "experiment_case": """created timestamp, experiment_id integer references {experiment} on delete cascade,
        case_id integer references {case} on delete cascade, unique (experiment_id, case_id)""",
    "experiment_model": """created timestamp, experiment_id integer references {experiment} on delete cascade,
        model_note_generator_id integer references {model}, model_note_grader_id integer references {model},
        model_note_grader_is_reasoning boolean not null""",
    "experiment_result": """created timestamp not null, updated timestamp not null, experiment_id integer not null,
        experiment_name text not null, hyperscribe_version text not null, hyperscribe_tags json not null,
        case_id integer not null, case_name text not null, text_llm_vendor text not null, text_llm_name text not null,
        cycle_time integer not null, cycle_transcript_overlap integer not null, failed boolean not null,
        errors json not null, generated_note_id integer not null, note_json json not null""",
    "experiment_result_score": """created timestamp not null,
        experiment_result_id integer references {experiment_result} on delete cascade, text_llm_vendor text not null,
        text_llm_name text not null, score_id integer not null, scoring_result json not null""",
    "script_run": "created timestamp, script text",
}
GENERATED = {"openai": "gpt-4.1", "anthropic": "claude-sonnet-4-5", "google": "models/gemini-2.5-flash"}


class Runner:
    """The clinical runner's tables in one schema of a database, with a clock that moves on with every row."""

    def __init__(self, connection: Connection[Any], schema: str, *, is_new: bool = True) -> None:
        self.connection = connection
        self.schema = schema
        self._seconds = itertools.count(0 if is_new else 100_000)
        if not is_new:
            return
        places = {table: f'"{schema}"."{table}"' for table in [*TABLES, "case_status", "rubric_validation"]}
        script = f"""
            create schema if not exists "{schema}";
            create type {places["case_status"]} as enum ('generation', 'review', 'evaluation');
            create type {places["rubric_validation"]} as enum ('not_evaluated', 'refused', 'accepted');
        """ + "".join(
            f"create table {places[table]} (id serial primary key, {columns.format(**places)});"
            for table, columns in TABLES.items()
        )
        connection.execute(script.encode())

    def now(self) -> datetime:
        return START + timedelta(seconds=next(self._seconds))

    def add(self, table: str, **values: Any) -> int:
        """Insert a row; its times are now unless given."""
        if "created timestamp" in TABLES[table]:
            values.setdefault("created", self.now())
        if "updated timestamp" in TABLES[table]:
            values.setdefault("updated", values["created"])
        cells = {
            name: json.dumps(value) if isinstance(value, dict | list) and name != "mood" else value
            for name, value in values.items()
        }
        query = SQL("insert into {} ({}) values ({}) returning id").format(
            Identifier(self.schema, table),
            SQL(", ").join(map(Identifier, cells)),
            SQL(", ").join(map(Placeholder, cells)),
        )
        row = self.connection.execute(query, cells).fetchone()
        assert row is not None
        return int(row[0])

    def case(self, name: str, **values: Any) -> int:
        turns = [
            {"speaker": "Clinician", "text": f"Guten Tag, {name}", "start": 0.0, "end": 1.5},
            {"speaker": "Patient", "text": "I cough 🤧"},
        ]
        defaults: dict[str, Any] = {
            "transcript": {"cycle_001": turns},
            "limited_chart": {"demographicStr": "a 40-year-old", "currentMedications": []},
            "profile": f"profile of {name}",
            "validation_status": "evaluation",
            "batch_identifier": "batch-1",
            "tags": {"severity": "mild"},
        }
        return self.add("case", name=name, **defaults | values)

    def rubric(self, case_id: int, author: str | None, **values: Any) -> int:
        defaults: dict[str, Any] = {
            "validation": "accepted",
            "rubric": [
                {"criterion": "names the cough", "weight": 40},
                {"criterion": "names the duration", "weight": 20},
            ],
            "case_provenance_classification": "",
            "comments": "",
            "text_llm_vendor": "",
            "text_llm_name": "",
            "temperature": 0.0,
        }
        if "validation" not in values or values["validation"] != "not_evaluated":
            values.setdefault("validation_timestamp", self.now())
        return self.add("rubric", case_id=case_id, author=author, **defaults | values)

    def experiment(self, name: str, cases: list[int], models: list[tuple[int, int, bool]], **values: Any) -> int:
        defaults = {
            "hyperscribe_version": "3b0c6ce0",
            "cycle_times": [],
            "cycle_transcript_overlaps": [100],
            "note_replications": 2,
            "grade_replications": 2,
        }
        experiment_id = self.add("experiment", name=name, **defaults | values)
        for case_id in cases:
            self.add("experiment_case", experiment_id=experiment_id, case_id=case_id)
        for generator, grader, is_reasoning in models:
            self.add(
                "experiment_model",
                experiment_id=experiment_id,
                model_note_generator_id=generator,
                model_note_grader_id=grader,
                model_note_grader_is_reasoning=is_reasoning,
            )
        return experiment_id

    def result(self, experiment_id: int, case_id: int, vendor: str = "openai", **values: Any) -> int:
        """A note attempt that succeeded, unless the values say otherwise."""
        note = values.get("note_json", [{"command": "hpi", "text": "coughs für 3 days"}])
        tokens = {"prompt": 1200, "generated": 300}
        note_id = self.add(
            "generated_note", case_id=case_id, note_json=note, token_counts=tokens, transcript2instructions={"x": "y"}
        )
        created = self.now()
        defaults: dict[str, Any] = {
            "experiment_name": "denormalised",
            "hyperscribe_version": "3b0c6ce0",
            "hyperscribe_tags": {"version": "1.2"},
            "case_name": "denormalised",
            "text_llm_vendor": vendor,
            "text_llm_name": GENERATED.get(vendor, ""),
            "cycle_time": 0,
            "cycle_transcript_overlap": 100,
            "failed": False,
            "errors": {},
            "generated_note_id": note_id,
            "note_json": note,
            "created": created,
            "updated": created + timedelta(milliseconds=750),
        }
        return self.add("experiment_result", experiment_id=experiment_id, case_id=case_id, **defaults | values)

    def grade(
        self, result_id: int, rubric_id: int | None, satisfactions: tuple[int, ...] = (100, 50), **values: Any
    ) -> int:
        weights = (40, 20, 10)
        verdicts = [
            {"id": i, "rationale": f"because {i}", "satisfaction": s, "score": round(weights[i] * s / 100, 2)}
            for i, s in enumerate(satisfactions)
        ]
        score_id = 0
        if rubric_id is not None:
            score_id = self.add(
                "score", rubric_id=rubric_id, generated_note_id=1, scoring_result=verdicts, overall_score=1.5
            )
        defaults: dict[str, Any] = {
            "text_llm_vendor": "openai",
            "text_llm_name": "gpt-4.1",
            "score_id": score_id,
            "scoring_result": verdicts,
        }
        return self.add("experiment_result_score", experiment_result_id=result_id, **defaults | values)

    def count(self, table: str) -> int:
        return int(world.value(self.connection, f'select count(*) from "{self.schema}"."{table}"'))

    def digest(self) -> str:
        tables = ((table, f'"{self.schema}"."{table}"') for table in TABLES)
        parts = (
            f"select '{name}', md5(string_agg(t::text, ';' order by t.id)) from {place} as t" for name, place in tables
        )
        return str(self.connection.execute(" union all ".join(parts).encode()).fetchall())


def fill(runner: Runner) -> dict[str, int]:
    """Write several hundred rows of a runner's life; returns the ids of the ugly ones."""
    ids: dict[str, int] = {}
    models = {
        name: runner.add("model", vendor=vendor, api_key=key, model=model)
        for name, vendor, key, model in [
            ("openai", "OpenAI", KEYS["openai"], ""),
            ("openai again", "openai", KEYS["second"], ""),
            ("anthropic", "Anthropic", KEYS["anthropic"], ""),
            ("o4", "openai", KEYS["openai"], "o4-mini"),
            ("mistral", "Mistral AI", "", "large"),
        ]
    }
    cases = [runner.case(f"case {i:02d} Müller", batch_identifier=f"batch-{i % 3}") for i in range(20)]
    rubrics: dict[int, list[int]] = {}
    for case_id in cases:
        runner.rubric(case_id, "ann@clinic.example", validation="accepted")
        generated = runner.rubric(
            case_id,
            "llm",
            validation="not_evaluated",
            text_llm_vendor="openai",
            text_llm_name="gpt-4o",
            temperature=0.5,
        )
        rubrics[case_id] = [
            runner.rubric(case_id, "ann@clinic.example", parent_rubric_id=generated, comments="übernommen"),
            runner.rubric(
                case_id,
                "bob@clinic.example",
                rubric=[
                    {"criterion": "älter", "weight": 40, "sense": "positive"},
                    {"criterion": "x", "weight": 20, "sense": "negative"},
                ],
            ),
        ]
    for case_id in cases[:6]:
        runner.add(
            "real_world_case",
            case_id=case_id,
            customer_identifier="c-1",
            patient_note_hash="abc",
            publishable=True,
            start_time=0.5,
            end_time=9.5,
        )
        runner.add("case_provenance", case_id=case_id, author="ann@clinic.example", provenance_type="real_world")
    for case_id in cases[6:9]:
        runner.add(
            "synthetic_case",
            case_id=case_id,
            category="med_management",
            turn_total=8,
            speaker_sequence=["a", "b"],
            mood=["patient is tearful"],
            temperature=1.3,
        )
    runner.add("contributor", email="ann@clinic.example")
    runner.add("script_run", script="x")
    runner.add("generated_note", case_id=cases[0], note_json=[], token_counts={}, transcript2instructions={})

    # ugly rubrics
    ids["no author"] = runner.rubric(cases[0], None)
    ids["no criteria"] = runner.rubric(cases[0], "eve@clinic.example", rubric=[])
    ids["text weights"] = runner.rubric(
        cases[0], "eve@clinic.example", rubric=[{"criterion": "a", "weight": "40"}, {"criterion": "b", "weight": "20"}]
    )
    ids["accepted never"] = runner.rubric(cases[1], "eve@clinic.example", validation_timestamp=None)
    twin = runner.now()
    ids["twin 1"] = runner.rubric(cases[2], "eve@clinic.example", created=twin, validation="refused")
    ids["twin 2"] = runner.rubric(cases[2], "eve@clinic.example", created=twin, validation="refused")
    ids["other parent"] = runner.rubric(cases[3], "eve@clinic.example", parent_rubric_id=ids["twin 1"])
    # ugly cases
    ids["cycles"] = runner.case(
        "in cycles",
        transcript={"cycle_002": [{"speaker": "B", "text": "two"}], "cycle_001": [{"speaker": "A", "text": "one"}]},
    )
    ids["list"] = runner.case('a "list"; drop table', transcript=[{"speaker": "A", "text": "one"}], profile="")
    ids["nul"] = runner.case("nul \\u0000", transcript={"cycle_001": [{"speaker": "A", "text": "a\0b \ud83d"}]})

    # a complete experiment: 10 cases x 2 combinations x 2 overlaps x 2 notes, 2 rubrics, 2 grades
    ids["complete"] = complete = runner.experiment(
        "complete",
        cases[:10],
        [(models["openai"], models["openai"], False), (models["anthropic"], models["openai again"], False)],
        cycle_transcript_overlaps=[0, 100],
    )
    for case_id, vendor, overlap, _ in itertools.product(cases[:10], ("openai", "anthropic"), (0, 100), range(2)):
        result = runner.result(complete, case_id, vendor, cycle_transcript_overlap=overlap)
        for rubric_id, _ in itertools.product(rubrics[case_id], range(2)):
            runner.grade(result, rubric_id)

    # one with every way to fail: 6 cases, 2 notes each
    ids["ugly"] = ugly = runner.experiment("ugly", cases[:6], [(models["openai"], models["openai"], False)])
    cause = {
        "error": f"no answer for {KEYS['openai']}",
        "files": ["a.py.run:1"],
        "variables": {"key": repr(KEYS["second"]), "env": "DB_PASSWORD=hunter2hunter2"},
    }
    runner.result(ugly, cases[0], failed=True, errors=cause)
    ids["note after failure"] = runner.result(ugly, cases[0])
    runner.result(ugly, cases[0])
    ids["no cause"] = runner.result(ugly, cases[1], failed=True)
    ids["never came back"] = runner.result(ugly, cases[1], "", generated_note_id=0, note_json=[])
    ids["graded failure"] = runner.result(
        ugly, cases[2], failed=True, errors={"error": "half way"}, note_json=[{"command": "hpi", "text": "half"}]
    )
    runner.grade(ids["graded failure"], rubrics[cases[2]][0])
    ids["empty note"] = runner.result(ugly, cases[2], note_json=[])
    ids["often graded"] = often = runner.result(ugly, cases[3], note_json=[{"text": "a\0b"}])
    for satisfaction in (10, 20, 30):
        runner.grade(often, rubrics[cases[3]][0], (satisfaction, 0))
    runner.grade(often, rubrics[cases[3]][1], (100, 100, 100))
    runner.grade(often, None)
    runner.grade(often, rubrics[cases[4]][0])
    ids["other model"] = runner.result(ugly, cases[4], "google")
    ids["no such case"] = runner.result(ugly, 987654)
    runner.grade(ids["no such case"], rubrics[cases[4]][0])
    runner.result(123456, cases[4])

    # run twice, the second time with another version and for the first case only; and once more with the first version
    ids["repeated"] = repeated = runner.experiment(
        "repeated", cases[:2], [(models["o4"], models["openai"], False)], note_replications=1
    )
    for version, case_id in [("v1", cases[0]), ("v1", cases[1]), ("v2", cases[0]), ("v1", cases[0]), ("v1", cases[1])]:
        runner.result(repeated, case_id, hyperscribe_version=version, text_llm_name="o4-mini")

    # chat and reasoning graders of one vendor
    ids["graders"] = graders = runner.experiment(
        "graders",
        cases[:2],
        [(models["openai"], models["openai"], True), (models["openai"], models["openai"], False)],
        note_replications=1,
        grade_replications=1,
    )
    for case_id, grader in itertools.product(cases[:2], ("gpt-4.1", "o3")):
        result = runner.result(graders, case_id)
        for rubric_id in rubrics[case_id]:
            runner.grade(result, rubric_id, text_llm_name=grader)
    runner.experiment("never started", cases[:3], [(models["mistral"], models["mistral"], False)])
    runner.experiment("impossible", cases[:3], [], note_replications=0)
    return ids


class Clinic:
    """A database of the harness with a runner's tables in it, its ugly rows by what is ugly, and what was imported."""

    def __init__(
        self, url: str, connection: Connection[Any], ids: dict[str, int], report: ClinicalReport | None = None
    ) -> None:
        self.url = url
        self.db = connection
        self.ids = ids
        self.report = report
        self.runner = Runner(connection, "public", is_new=False)

    def imported(self, **options: Any) -> ClinicalReport:
        with database.connect(self.url) as connection:
            connection.execute(
                "set timezone = 'Asia/Tokyo'"
            )  # the source's times have no zone, and are UTC all the same
            return import_clinical_runner(connection, self.url, **options)


@pytest.fixture(scope="module")
def filled(server_url: str, template: str) -> Iterator[tuple[str, dict[str, int]]]:
    """A database with a filled clinical runner in schema public, to clone: its name and the ids of the ugly rows."""
    with world.cloned(server_url, template) as url:
        with psycopg.connect(url) as connection:
            ids = fill(Runner(connection, "public"))
            name = connection.info.dbname
        yield name, ids


@pytest.fixture
def clinic(server_url: str, filled: tuple[str, dict[str, int]]) -> Iterator[Clinic]:
    """A filled clinical runner of which nothing is imported yet."""
    with world.cloned(server_url, filled[0]) as url, psycopg.connect(url, autocommit=True) as connection:
        yield Clinic(url, connection, filled[1])


@pytest.fixture(scope="module")
def moved(server_url: str, filled: tuple[str, dict[str, int]]) -> Iterator[Clinic]:
    """A clinical runner that was imported, to look at."""
    with world.cloned(server_url, filled[0]) as url, psycopg.connect(url, autocommit=True) as connection:
        yield Clinic(url, connection, filled[1], Clinic(url, connection, filled[1]).imported())


def run_of(db: Connection[Any], name: str) -> dict[str, Any]:
    (run,) = database.rows(db, "run_progress", run=name)
    return run


# -- whole


def test_every_row_is_imported_or_named_with_the_reason(moved: Clinic) -> None:
    assert moved.report is not None
    counts = {count.what: count for count in moved.report.counts}
    tables = {
        "cases": ("case", 0),
        "rubrics": ("rubric", 1),
        "models": ("model", 0),
        "experiments": ("experiment", 1),
        "cases of experiments": ("experiment_case", 3),
        "model combinations": ("experiment_model", 0),
        "results": ("experiment_result", 2),
        "grades": ("experiment_result_score", 1),
    }
    assert counts.keys() == tables.keys()
    for what, (table, left_out) in tables.items():
        count = counts[what]
        assert (count.source, count.left_out) == (moved.runner.count(table), left_out), what
        assert count.inserted + count.updated + count.unchanged + count.left_out == count.source, what
    assert world.value(moved.db, "select count(*) from pgharness.cases") == counts["cases"].inserted
    assert world.value(moved.db, "select count(*) from pgharness.rubrics") == counts["rubrics"].inserted
    assert world.value(moved.db, "select count(*) from pgharness.instances") == counts["experiments"].inserted
    # each result is a note, a failure, or a try before one of them
    results = """select (select count(*) from pgharness.notes)
                      + (select count(*) from pgharness.failures where kind = 'note')
                      + (select count(*) from pgharness.calls as c
                          where kind = 'note' and exists (
                                select from pgharness.calls as later
                                 where later.run_id = c.run_id and later.kind = 'note' and later.ordinal = c.ordinal
                                   and later.attempt > c.attempt))"""
    assert world.value(moved.db, results) == counts["results"].inserted
    # each grade is a grade, or a call with its answer; one that does not fit its rubric is a failure besides
    grades = """select (select count(*) from pgharness.grades)
                     + (select count(*) from pgharness.calls where kind = 'grade')"""
    assert world.value(moved.db, grades) == counts["grades"].inserted


def test_what_stays_behind_is_counted_with_the_reason(moved: Clinic) -> None:
    assert moved.report is not None
    for words in (
        f"rubrics: 1 left out: criteria is empty (rubric {moved.ids['no criteria']} of the source)",
        "experiments: 1 left out: note_replications is 0",
        "cases of experiments: 3 left out",
        "results: 2 left out",
        "grades: 1 left out",
        "contributor: 1 rows stay",
        "script_run: 1 rows stay",
        "notes and scores: 2 made outside of experiments",
        "models: 5 their keys were left behind",
    ):
        assert any(remark.startswith(words) for remark in moved.report.remarks), words


def test_imported_runs_keep_every_rule_and_queue_no_work(moved: Clinic) -> None:
    assert world.orphans(moved.db) == []
    assert world.value(moved.db, "select count(*) from procrastinate.procrastinate_jobs") == 0


def test_importing_twice_changes_nothing(clinic: Clinic) -> None:
    first = clinic.imported()
    before = world.contents(clinic.db)
    second = clinic.imported()
    assert world.contents(clinic.db) == before
    for one, two in zip(first.counts, second.counts, strict=True):
        assert (two.source, two.left_out) == (one.source, one.left_out)
        assert (two.inserted, two.updated, two.unchanged) == (0, 0, one.inserted + one.unchanged)


def test_the_source_is_only_read(clinic: Clinic) -> None:
    before = clinic.runner.digest()
    clinic.imported()
    assert clinic.runner.digest() == before
    # not by good manners alone: the connection that reads cannot write
    with database.snapshot(clinic.url) as source, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        source.execute("delete from public.script_run")


def test_no_key_is_left_anywhere(moved: Clinic) -> None:
    tables = [name for (name,) in moved.db.execute("select tablename from pg_tables where schemaname = 'pgharness'")]
    texts = [f"select coalesce(string_agg(t::text, ''), '') from pgharness.{table} as t" for table in tables]
    everything = str(moved.report) + "".join(world.value(moved.db, text) for text in texts)
    assert "no answer for [key removed]" in everything
    for secret in [*KEYS.values(), "hunter2"]:
        assert secret not in everything


def test_a_dry_run_counts_the_same_and_changes_nothing(clinic: Clinic) -> None:
    before = world.contents(clinic.db)
    tried = clinic.imported(dry_run=True)
    assert world.contents(clinic.db) == before
    assert clinic.imported().counts == tried.counts


def test_another_schema_of_another_database_is_a_source_too(url: str, empty_url: str) -> None:
    with psycopg.connect(empty_url) as connection:
        elsewhere = Runner(connection, "old clinic")
        fill(elsewhere)
        connection.commit()
        told: list[int] = []
        with database.connect(url) as here:
            report = import_clinical_runner(
                here, empty_url, schema="old clinic", on_progress=lambda done, _: told.append(done)
            )
        counts = {count.what: count.source for count in report.counts}
        assert counts["grades"] == elsewhere.count("experiment_result_score")
        assert told[-1] > sum(counts.values()) and told == sorted(told)


# -- what becomes of what


def test_a_case_keeps_its_transcript_chart_profile_and_provenance(moved: Clinic) -> None:
    cases = {case["name"]: case for case in database.rows(moved.db, "cases")}
    first = cases["case 00 Müller"]
    assert first["input"] == {
        "transcript": [
            {"speaker": "Clinician", "text": "Guten Tag, case 00 Müller", "start": 0.0, "end": 1.5},
            {"speaker": "Patient", "text": "I cough 🤧"},
        ],
        "chart": {"demographicStr": "a 40-year-old", "currentMedications": []},
        "profile": "profile of case 00 Müller",
    }
    metadata = first["metadata"]
    assert (metadata["status"], metadata["batch"], metadata["tags"]) == ("evaluation", "batch-0", {"severity": "mild"})
    assert metadata["provenance"]["real_world"]["customer_identifier"] == "c-1"
    assert metadata["provenance"]["ann@clinic.example"] == {"provenance_type": "real_world"}
    assert cases["case 06 Müller"]["metadata"]["provenance"]["synthetic"]["mood"] == ["patient is tearful"]
    turns = [(turn["speaker"], turn["text"], turn["cycle"]) for turn in cases["in cycles"]["input"]["transcript"]]
    assert turns == [("A", "one", "cycle_001"), ("B", "two", "cycle_002")]
    assert cases['a "list"; drop table']["input"]["transcript"] == [{"speaker": "A", "text": "one"}]
    assert cases["nul \\u0000"]["input"]["transcript"][0]["text"] == "a\ufffdb \ufffd"
    assert first["created_at"].replace(tzinfo=None) == world.value(moved.db, "select min(created) from public.case")


def test_rubrics_make_the_same_cases_eligible_as_in_the_source(moved: Clinic) -> None:
    source = moved.db.execute(
        """select c.name from public.rubric as r join public.case as c on c.id = r.case_id
            where r.validation = 'accepted' and r.author <> 'llm' and r.author is not null
            group by 1 having count(distinct r.author) >= 2"""
    ).fetchall()
    eligible = {row["case_name"] for row in database.rows(moved.db, "eligible_cases")}
    assert eligible == {name for (name,) in source} and len(eligible) == 20


def test_rubrics_keep_author_parent_validation_and_criteria(moved: Clinic) -> None:
    rubrics = world.rows(
        moved.db,
        """select r.*, p.author as parent from pgharness.rubrics as r
             left join pgharness.rubrics as p on p.id = r.parent_id order by r.id""",
    )
    derived = [rubric for rubric in rubrics if rubric["parent"]]
    assert len(derived) == 20
    assert {(r["author"], r["parent"], r["comments"]) for r in derived} == {("ann@clinic.example", "llm", "übernommen")}
    generated = [rubric for rubric in rubrics if rubric["author"] == "llm"]
    assert len(generated) == 21 and not any(rubric["is_human"] for rubric in generated)
    assert {rubric["generator"] for rubric in generated} == {"openai/gpt-4o", None}
    assert any({"criterion": "x", "weight": 20, "sense": "negative"} in rubric["criteria"] for rubric in rubrics)
    eve = [rubric for rubric in rubrics if rubric["author"] == "eve@clinic.example"]
    assert eve[0]["criteria"][0]["weight"] == 40 and all(rubric["validated_at"] for rubric in eve)
    assert [rubric["case_name"] for rubric in eve].count("case 02 Müller") == 2 and eve[-1]["parent"] is None


def test_models_name_the_variable_of_their_key(moved: Clinic) -> None:
    models = [model for model in database.rows(moved.db, "models") if model["api_key_env"]]
    assert {model["name"]: (model["provider"], model["model"], model["api_key_env"]) for model in models} == {
        "openai/default": ("openai", "default", "OPENAI_API_KEY"),
        "openai/o4-mini": ("openai", "o4-mini", "OPENAI_API_KEY"),
        "openai/gpt-4o": ("openai", "gpt-4o", "OPENAI_API_KEY"),
        "anthropic/default": ("anthropic", "default", "ANTHROPIC_API_KEY"),
        "google/gemini-2.5-flash": ("gemini", "gemini-2.5-flash", "GEMINI_API_KEY"),
        "mistral ai/large": ("openai_compatible", "large", "MISTRAL_AI_API_KEY"),
    }


def test_a_complete_experiment_becomes_a_completed_run_that_every_view_shows(moved: Clinic) -> None:
    run = run_of(moved.db, "complete/1")
    assert (run["status"], run["notes_succeeded"], run["grades_succeeded"]) == ("completed", 80, 320)
    notes = database.rows(moved.db, "note_results", run="complete/1")
    places = {(note["case_name"], note["combination"], note["overlap"], note["replication"]) for note in notes}
    combinations = {"openai/default -> openai/default", "anthropic/default -> openai/default"}
    assert len(notes) == len(places) == 80
    assert {place[1:] for place in places} == set(itertools.product(combinations, (0, 100), (1, 2)))
    used = {(note["input_tokens"], note["output_tokens"], note["latency_ms"]) for note in notes}
    assert used == {(1200, 300, 750)}
    grades = database.rows(moved.db, "grade_results", run="complete/1")
    assert len(grades) == 320 and {(grade["score"], grade["max_score"]) for grade in grades} == {(50, 60)}
    graded = {(grade["rubric_author"], grade["grade_replication"]) for grade in grades}
    assert graded == set(itertools.product(("ann@clinic.example", "bob@clinic.example"), (1, 2)))
    first = world.value(moved.db, "select min(created) from public.experiment_result_score")
    assert min(grade["created_at"] for grade in grades).replace(tzinfo=None) == first


def test_a_run_says_how_it_was_made(moved: Clinic) -> None:
    (instance,) = database.rows(moved.db, "instances", name="complete")
    assert (instance["note_replications"], instance["cycle_transcript_overlaps"]) == (2, [0, 100])
    assert instance["software_version"] == "3b0c6ce0"
    run_id = run_of(moved.db, "complete/1")["run_id"]
    definition = world.value(moved.db, "select definition from pgharness.run_definitions where run_id = %s", run_id)
    assert definition["imported"]["tags"] == {"version": "1.2"} and definition["software_version"] == "3b0c6ce0"
    frozen = database.rows(moved.db, "run_combinations", order="number", run_id=run_id)
    assert [row["generator"]["model"] for row in frozen] == ["gpt-4.1", "claude-sonnet-4-5"]


def test_every_way_to_fail_is_kept_where_it_belongs(moved: Clinic) -> None:
    run = run_of(moved.db, "ugly/1")
    assert (run["status"], run["notes_succeeded"], run["notes_failed"], run["grades_failed"]) == ("cancelled", 5, 3, 1)
    assert "were never made" in run["reason"]
    failures = database.rows(moved.db, "failures", run_id=run["run_id"])
    assert {(failure["kind"], failure["cause"], failure["error"]) for failure in failures} == {
        ("note", "error", "it failed, and its cause was not recorded"),
        ("note", "error", "no note was recorded"),
        ("note", "code_failed", "half way"),
        ("grade", "invalid_output", "its verdicts do not fit the criteria of its rubric"),
    }
    assert any('"half"' in (failure["answer"] or "") for failure in failures)
    # a failure before a note is a try of it
    (note,) = (n for n in database.rows(moved.db, "note_results", run="ugly/1") if n["attempts"] == 2)
    at = {"run_id": run["run_id"], "kind": "note", "ordinal": note["note_ordinal"]}
    failed, made = database.rows(moved.db, "calls", order="attempt", **at)
    assert (failed["outcome"], failed["error"]) == ("code_failed", "no answer for [key removed]")
    assert "a.py.run:1" in failed["answer"] and made["outcome"] == "succeeded"
    assert made["request_id"] == f"experiment_result/{moved.ids['note after failure']}"


def test_of_more_grades_than_replications_the_latest_count_and_the_others_are_kept(moved: Clinic) -> None:
    grades = database.rows(moved.db, "grade_results", order="grade_replication", run="ugly/1")
    assert [grade["score"] for grade in grades] == [8, 12]
    calls = database.rows(moved.db, "calls", run_id=run_of(moved.db, "ugly/1")["run_id"], kind="grade")
    assert {call["error"] for call in calls} == {
        "superseded by later grades of the same note and rubric",
        "its verdicts do not fit the criteria of its rubric",
        "its rubric is not there any more, or is of another case",
        "its note failed",
    }
    assert all("because 0" in call["answer"] for call in calls)


def test_a_note_is_kept_as_it_was_whoever_wrote_it(moved: Clinic) -> None:
    notes = {note["case_name"]: note for note in database.rows(moved.db, "note_results", run="ugly/1")}
    assert notes["case 02 Müller"]["output"] == []
    assert notes["case 03 Müller"]["output"] == [{"text": "a\ufffdb"}]
    assert notes["case 04 Müller"]["combination"] == "google/gemini-2.5-flash (not planned)"


def test_each_version_and_each_repetition_is_a_run_of_its_own(moved: Clinic) -> None:
    runs = world.rows(
        moved.db,
        """select r.name, d.definition ->> 'software_version' as version, r.notes_succeeded
             from pgharness.runs as r join pgharness.run_definitions as d on d.run_id = r.id
            where r.instance = 'repeated' order by r.id""",
    )
    expected = [("repeated/1", "v1", 2), ("repeated/2", "v1", 2), ("repeated/3", "v2", 1)]
    assert [tuple(run.values()) for run in runs] == expected


def test_chat_and_reasoning_graders_of_one_vendor_are_told_apart(moved: Clinic) -> None:
    run = run_of(moved.db, "graders/1")
    assert (run["status"], run["notes_succeeded"], run["grades_succeeded"]) == ("completed", 4, 8)
    graders = database.rows(moved.db, "run_combinations", run_id=run["run_id"])
    name = "openai/default -> openai/default"
    assert {row["name"]: row["grader"]["model"] for row in graders} == {name: "gpt-4.1", f"{name} (reasoning)": "o3"}


# -- afterwards


@pytest.mark.parametrize(
    ("function", "run"), [("rerun", "complete/1"), ("resume_run", "ugly/1"), ("retry_failed", "graders/1")]
)
def test_an_imported_run_is_history(clinic: Clinic, function: str, run: str) -> None:
    runner = clinic.runner
    if function == "retry_failed":
        # a completed run that has something to retry
        result = world.value(
            clinic.db, "select max(id) from public.experiment_result where experiment_id = %s", clinic.ids["graders"]
        )
        clinic.db.execute("update public.experiment_result set failed = true where id = %s", (result,))
    clinic.imported()
    before = world.contents(clinic.db)
    with database.connect(clinic.url) as connection, pytest.raises(WrongState, match="was imported") as refused:
        database.call(connection, function, run_id=run_of(connection, run)["run_id"])
    assert "start_run" in str(refused.value.hint)
    assert world.contents(clinic.db) == before and runner.count("case") == 23


def test_an_imported_experiment_is_ready_to_run(clinic: Clinic) -> None:
    clinic.imported()
    (started,) = database.call(clinic.db, "start_run", instance="complete")
    assert (started["run"], started["notes"], started["grades"]) == ("complete/2", 80, 320)
    assert world.orphans(clinic.db) == []


def test_what_the_source_got_since_is_added_and_a_run_that_grew_keeps_its_id(clinic: Clinic) -> None:
    clinic.imported()
    runner, db = clinic.runner, clinic.db
    before = {run["run"]: run["run_id"] for run in database.rows(db, "run_progress")}
    runner.rubric(runner.case("a new case"), "ann@clinic.example")
    db.execute(
        "update public.rubric set validation = 'accepted', validation_timestamp = now() where id = %s",
        (clinic.ids["twin 1"],),
    )
    case_id, rubric_id = world.rows(db, "select case_id, id from public.rubric where author like 'ann%%' order by id")[
        0
    ].values()
    result = runner.result(clinic.ids["repeated"], case_id, hyperscribe_version="v2", text_llm_name="o4-mini")
    runner.grade(result, rubric_id)
    report = {count.what: count for count in clinic.imported().counts}
    assert (report["cases"].inserted, report["rubrics"].inserted, report["rubrics"].updated) == (1, 1, 1)
    assert (report["results"].inserted, report["results"].updated, report["grades"].inserted) == (1, 5, 1)
    after = {run["run"]: run["run_id"] for run in database.rows(db, "run_progress")}
    assert before.items() < after.items() and after.keys() - before.keys() == {"repeated/4"}
    assert world.orphans(db) == []


def test_a_case_that_a_run_used_keeps_the_input_that_the_run_saw(clinic: Clinic) -> None:
    clinic.imported()
    changed = """update public.case set transcript = '[{"speaker": "A", "text": "new"}]' where name = %s"""
    clinic.db.execute(changed, ("case 00 Müller",))
    clinic.db.execute(changed, ("in cycles",))
    report = clinic.imported()
    assert (report.counts[0].updated, report.counts[0].unchanged) == (1, 22)
    assert any("they keep the input they had: case 00 Müller" in remark for remark in report.remarks)
    assert world.orphans(clinic.db) == []


def test_a_name_that_is_taken_by_something_else_is_refused_and_nothing_changes(clinic: Clinic) -> None:
    clinic.db.execute("insert into pgharness.cases (name, input) values ('case 03 Müller', '\"mine\"')")
    clinic.db.execute("insert into pgharness.instances (name) values ('ugly')")
    before = world.contents(clinic.db)
    with pytest.raises(ImportRefused) as refused:
        clinic.imported()
    assert world.contents(clinic.db) == before
    for words in ('case "case 03 Müller" exists here', 'instance "ugly" exists here', "rename it first"):
        assert words in str(refused.value.detail)


def test_a_case_renamed_here_is_still_the_same_case(clinic: Clinic) -> None:
    clinic.imported()
    clinic.db.execute("update pgharness.cases set name = 'mine' where name = 'in cycles'")
    assert all(count.inserted == 0 for count in clinic.imported().counts)


def test_a_schema_without_the_tables_is_refused_with_what_to_do(url: str) -> None:
    with database.connect(url) as connection, pytest.raises(ImportRefused, match='has no table "case"') as refused:
        import_clinical_runner(connection, url)
    assert "--schema" in str(refused.value.hint) and "--from" in str(refused.value.hint)


def test_an_author_may_import_and_a_reader_may_not(clinic: Clinic) -> None:
    if not world.value(clinic.db, "select exists (select from pg_roles where rolname = 'pgharness_author')"):
        pytest.skip("roles cannot be created on this server")
    with database.connect(clinic.url) as connection:
        connection.execute("set role pgharness_reader")
        with pytest.raises(DatabaseError, match="permission denied"):
            import_clinical_runner(connection, clinic.url)
        connection.execute("set role pgharness_author")
        assert import_clinical_runner(connection, clinic.url).counts[0].inserted == 23


def test_a_place_has_one_ordinal(db: Connection[Any]) -> None:
    wrong = """select count(*) from generate_series(0, 3 * 2 * 2 * 4 - 1) as o
                cross join lateral (
                      select row(1, '{}', 3, 2, array[50, 100], 1)::pgharness.run_definitions as d) as def
                cross join lateral pgharness._note_place(def.d, o) as p
                where o <> pgharness._note_ordinal(
                               def.d, p.case_number, p.combination_number, p.overlap, p.replication)"""
    assert world.value(db, wrong) == 0


# -- by SQL alone


def history(connection: Connection[Any], **changes: Any) -> dict[str, Any]:
    """A run of two cases, a note each, as import_run() takes it."""
    connection.execute("insert into pgharness.instances (name) values ('old') on conflict do nothing")
    connection.execute(
        """insert into pgharness.cases (name, input)
           select 'case ' || i, to_jsonb('text'::text) from generate_series(1, 2) as i on conflict do nothing"""
    )
    run = {
        "key": "old system, run 1",
        "instance": "old",
        "imported": {"system": "old"},
        "created_at": "2025-01-31T12:00:00Z",
        "finished_at": "2025-01-31T12:30:00Z",
        "note_replications": 1,
        "grade_replications": 1,
        "rubric_count": 0,
        "overlaps": [100],
        "cases": [row["id"] for row in database.rows(connection, "cases", order="id")],
        "combinations": [
            {"name": "a", "generator_id": world.value(connection, "select max(id) from pgharness.models")}
        ],
        "rubrics": [],
    }
    return {key: value for key, value in (run | changes).items() if value is not None}


def test_a_run_made_elsewhere_can_be_imported_with_sql_alone(url: str) -> None:
    with database.connect(url) as connection:
        (made,) = database.call(connection, "import_run", run=history(connection))
        notes = [
            {"ordinal": i, "attempts": 1, "output": f"note {i}", "created_at": "2025-01-31T12:10:00Z"} for i in range(2)
        ]
        items = {"notes": json.dumps(notes), "grades": "[]", "failures": "[]", "calls": "[]"}
        database.call(connection, "import_run_items", run_id=made["run_id"], **items)
        (finished,) = database.call(connection, "finish_imported_run", run_id=made["run_id"])
        assert (made["outcome"], finished["run"], finished["status"]) == ("inserted", "old/1", "completed")
        run = run_of(connection, "old/1")
        assert (run["notes_succeeded"], run["active_seconds"], run["grade_count"]) == (2, 1800, 0)
        assert world.orphans(connection) == []
        (again,) = database.call(connection, "import_run", run=history(connection))
        assert again == {"run_id": made["run_id"], "outcome": "unchanged"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cases": None}, 'does not say its "cases"'),
        ({"imported": None}, 'does not say its "imported"'),
        ({"instance": "nowhere"}, 'instance "nowhere" does not exist'),
        ({"cases": [987654]}, "names a case or a model that does not exist"),
        ({"combinations": [{"name": "a", "generator_id": 987654}]}, "names a case or a model that does not exist"),
        ({"rubrics": [{"case_number": 99, "number": 1, "rubric_id": 1}]}, "one of a case that it does not have"),
        ({"key": "mine"}, 'run "own/1" was not imported, and has the key "mine"'),
    ],
)
def test_a_run_that_says_too_little_is_refused(url: str, changes: dict[str, Any], words: str) -> None:
    with database.connect(url) as connection:
        run = history(connection, **changes)
        connection.execute("insert into pgharness.instances (name) values ('own')")
        connection.execute("select pgharness.add_cases('own')")
        connection.execute("insert into pgharness.model_combinations (instance, generator) values ('own', 'simulator')")
        database.call(connection, "start_run", instance="own", idempotency_key="mine")
        before = world.contents(connection)
        with pytest.raises(DatabaseError, match=words) as refused:
            database.call(connection, "import_run", run=run)
        assert refused.value.hint and world.contents(connection) == before


def test_an_item_outside_of_the_plan_is_refused(url: str) -> None:
    with database.connect(url) as connection:
        (made,) = database.call(connection, "import_run", run=history(connection))
        note = {"ordinal": 2, "attempts": 1, "output": "x", "created_at": "2025-01-31T12:10:00Z"}
        items = {"notes": json.dumps([note]), "grades": "[]", "failures": "[]", "calls": "[]"}
        with pytest.raises(DatabaseError, match="has no place for 1 of these notes"):
            database.call(connection, "import_run_items", run_id=made["run_id"], **items)
        (own,) = database.call(connection, "finish_imported_run", run_id=made["run_id"])
        assert (own["status"], own["reason"]) == ("cancelled", "2 of its notes and 0 of its grades were never made")
