"""A small study of simulated models that write notes of invented cases: what reports and analyses are tested on.

The careful model repeats more of a case's facts than the hasty one, and its twin differs from it in nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import psycopg

import world

SYMPTOMS = (
    "cough",
    "fever",
    "headache",
    "nausea",
    "rash",
    "dizziness",
    "tiredness",
    "wheezing",
    "earache",
    "heartburn",
)
DRUGS = ("paracetamol", "ibuprofen", "amoxicillin", "cetirizine", "omeprazole", "salbutamol", "loratadine", "codeine")
MODELS = """
insert into pgharness.models (name, provider, parameters, input_usd_per_million, output_usd_per_million) values
    ('study/careful', 'simulator', '{"quality": 0.85, "latency_seconds": 0.004}', 3, 15),
    ('study/hasty', 'simulator', '{"quality": 0.5, "latency_seconds": 0.002, "error_rate": 0.02}', 0.25, 1.25),
    ('study/twin', 'simulator', '{"quality": 0.85, "latency_seconds": 0.004}', 3, 15),
    ('study/judge', 'simulator', '{"noise": 6, "latency_seconds": 0.001}', 1, 5)
on conflict do nothing
"""
COMBINATIONS = (("careful", "study/careful"), ("hasty", "study/hasty"), ("twin", "study/twin"))


def add_cases(db: psycopg.Connection[Any], count: int, *, prefix: str = "visit") -> list[str]:
    """Insert cases of a few facts each, with rubrics of two authors that ask for them; return the cases' names."""
    names = [f"{prefix} {number}" for number in range(1, count + 1)]
    for number, name in enumerate(names):
        facts = [
            f"The {SYMPTOMS[(number * 3 + k) % 10]} began {2 + (number + k) % 9} days ago."
            for k in range(3 + number % 3)
        ] + [f"Takes {DRUGS[(number + 3 * k) % 8]} {1 + (number + k) % 3} times a day." for k in range(3)]
        lines = [{"speaker": "Patient", "text": fact} for fact in facts]
        db.execute(
            "insert into pgharness.cases (name, input, metadata) values (%s, %s, %s)",
            (name, json.dumps(lines), json.dumps({"facts": len(facts)})),
        )
        for author, part in (("ann", facts), ("bob", facts[::-1][:4])):
            criteria = [{"criterion": f"Says: {fact}", "weight": 10 - k} for k, fact in enumerate(part)]
            db.execute(
                "insert into pgharness.rubrics (case_name, author, validation, criteria) values (%s, %s, 'accepted', %s)",
                (name, author, json.dumps(criteria)),
            )
    return names


def start(
    db: psycopg.Connection[Any],
    name: str = "study",
    *,
    cases: Sequence[str],
    combinations: Sequence[tuple[str, str]] = COMBINATIONS,
    grader: str = "study/judge",
    **columns: object,
) -> int:
    """Define an instance of some cases and start a run of it; return the run's id."""
    db.execute(MODELS)
    fields = {"name": name, "experiment": "note_grade", "description": "Does the careful model earn its price?"}
    fields |= {"note_replications": 2, "grade_replications": 2, "retry_delay_seconds": 0.01} | columns
    marks = ", ".join(["%s"] * len(fields))
    statement = f"insert into pgharness.instances ({', '.join(fields)}) values ({marks})"
    db.execute(statement.encode(), list(fields.values()))
    db.execute("select pgharness.add_cases(%s, names => %s)", (name, list(cases)))
    for combination, generator in combinations:
        db.execute(
            "insert into pgharness.model_combinations (instance, name, generator, grader) values (%s, %s, %s, %s)",
            (name, combination, generator, grader),
        )
    return world.start(db, name)
