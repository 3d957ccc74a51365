"""What people write: names or ids everywhere, refusals that help, defaults, and content that is frozen once used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from world import add_cases, add_instance, orphans, refused, register, rows, run_of, start, value, words, work_off

Database = Connection[Any]


@dataclass(frozen=True)
class Reference:
    """A column pair that names a row of another table: how to make the row, and the referenced rows `a` and `b`."""

    table: str
    column: str
    parent: str
    insert: str
    is_optional: bool = False

    @property
    def id_column(self) -> str:
        return "case_id" if self.column == "case_name" else f"{self.column}_id"

    def __str__(self) -> str:
        return f"{self.table}.{self.column}"


_CRITERIA = """'[{"criterion": "c", "weight": 1}]'"""
REFERENCES = [
    Reference("instances", "project", "projects", "name) values ('child'", is_optional=True),
    Reference("instances", "experiment", "experiments", "name) values ('child'"),
    Reference("cases", "dataset", "datasets", "name, input) values ('child', '1'", is_optional=True),
    Reference("rubrics", "case_name", "cases", f"author, criteria) values ('ann', {_CRITERIA}"),
    Reference(
        "rubrics",
        "generator",
        "models",
        f"case_name, author, criteria) values ('other', 'm', {_CRITERIA}",
        is_optional=True,
    ),
    Reference("instance_cases", "instance", "instances", "case_name) values ('other'"),
    Reference("instance_cases", "case_name", "cases", "instance) values ('other'"),
    Reference("model_combinations", "instance", "instances", "generator) values ('other'"),
    Reference("model_combinations", "generator", "models", "instance, name) values ('other', 'pair'"),
    Reference(
        "model_combinations", "grader", "models", "instance, generator) values ('other', 'other'", is_optional=True
    ),
]
PARENTS = {
    "projects": "insert into pgharness.projects (name) values (%s) returning id",
    "experiments": "insert into pgharness.experiments (name) values (%s) returning id",
    "datasets": "insert into pgharness.datasets (name) values (%s) returning id",
    "cases": "insert into pgharness.cases (name, input) values (%s, '\"text\"') returning id",
    "models": "insert into pgharness.models (name, provider) values (%s, 'simulator') returning id",
    "instances": "insert into pgharness.instances (name) values (%s) returning id",
}


def insert(db: Database, reference: Reference, **given: object) -> Any:
    """Insert a row with some of the reference's columns; return what it then refers to, as id and name."""
    columns, values = reference.insert.split(") values (")
    for column, content in given.items():
        columns, values = f"{columns}, {column}", f"{values}, {psycopg.sql.Literal(content).as_string(db)}"
    query = f"insert into pgharness.{reference.table} ({columns}) values ({values}) returning {reference.id_column}, {reference.column}"
    row = db.execute(query.encode()).fetchone()
    assert row is not None
    return row


@pytest.fixture
def parents(tx: Database) -> dict[str, dict[str, int]]:
    """Rows `a`, `b` and `other` of every table that is referred to: their ids by table and name."""
    return {table: {name: value(tx, query, name) for name in ("a", "b", "other")} for table, query in PARENTS.items()}


@pytest.mark.parametrize("reference", REFERENCES, ids=str)
def test_a_row_may_be_inserted_with_a_name_an_id_or_both(
    tx: Database, parents: dict[str, dict[str, int]], reference: Reference
) -> None:
    a = parents[reference.parent]["a"]
    for given in (
        {reference.column: "a"},
        {reference.id_column: a},
        {reference.column: str(a)},
        {reference.id_column: a, reference.column: "a"},
    ):
        with tx.transaction(force_rollback=True):
            assert insert(tx, reference, **given) == (a, "a")


@pytest.mark.parametrize("reference", REFERENCES, ids=str)
def test_a_row_may_be_moved_by_name_and_by_id(
    tx: Database, parents: dict[str, dict[str, int]], reference: Reference
) -> None:
    a, b = parents[reference.parent]["a"], parents[reference.parent]["b"]
    insert(tx, reference, **{reference.column: "a"})
    referred = f"where {reference.id_column} in ({a}, {b}) returning {reference.id_column}, {reference.column}"
    for change, expected in (
        (f"{reference.column} = 'b'", (b, "b")),
        (f"{reference.id_column} = {a}", (a, "a")),
        (f"{reference.column} = '{b}'", (b, "b")),
        (f"{reference.column} = 'a', {reference.id_column} = {a}", (a, "a")),
    ):
        changed = tx.execute(f"update pgharness.{reference.table} set {change} {referred}".encode()).fetchall()
        assert changed == [expected], change
    assert orphans(tx) == []


@pytest.mark.parametrize("reference", [r for r in REFERENCES if r.is_optional], ids=str)
def test_an_optional_reference_may_be_taken_away_by_name_and_by_id(
    tx: Database, parents: dict[str, dict[str, int]], reference: Reference
) -> None:
    for column in (reference.column, reference.id_column):
        insert_id = insert(tx, reference, **{reference.column: "a"})[0]
        emptied = tx.execute(
            f"update pgharness.{reference.table} set {column} = null where {reference.id_column} = {insert_id}"
            f" returning {reference.id_column}, {reference.column}".encode()
        ).fetchall()
        assert emptied == [(None, None)]
        tx.execute(f"delete from pgharness.{reference.table} where {reference.column} is null".encode())


@pytest.mark.parametrize("reference", REFERENCES, ids=str)
def test_an_unknown_name_is_refused_with_what_exists_and_what_to_type(
    tx: Database, parents: dict[str, dict[str, int]], reference: Reference
) -> None:
    what = reference.parent.removesuffix("s")
    with refused(
        tx, "PH001", f'{what} "nope" does not exist', "Some that exist: ", "other", "b, a", "insert into pgharness."
    ):
        insert(tx, reference, **{reference.column: "nope"})
    for missing in (987654321, -1, 0):
        with refused(
            tx,
            "PH001",
            f"{what} with id {missing} does not exist",
            f"select id, name from pgharness.{reference.parent}",
        ):
            insert(tx, reference, **{reference.id_column: missing})
    insert(tx, reference, **{reference.column: "a"})
    for change in (f"{reference.column} = 'nope'", f"{reference.id_column} = 987654321"):
        with refused(tx, "PH001", "does not exist"):
            tx.execute(f"update pgharness.{reference.table} set {change} where {reference.column} = 'a'".encode())


@pytest.mark.parametrize(
    "reference", [r for r in REFERENCES if not r.is_optional and r.column != "experiment"], ids=str
)
def test_a_required_reference_that_is_left_out_is_named(
    tx: Database, parents: dict[str, dict[str, int]], reference: Reference
) -> None:
    with refused(tx, "PH002", f"{reference.parent.removesuffix('s')} is missing", "insert into pgharness."):
        insert(tx, reference)


def test_a_name_that_looks_like_an_id_is_a_name_first(tx: Database) -> None:
    first = value(tx, PARENTS["projects"], "plain")
    second = value(tx, PARENTS["projects"], str(first))
    by_name = "insert into pgharness.instances (name, project) values (%s, %s) returning project_id"
    assert value(tx, by_name, "one", str(first)) == second
    assert (
        value(tx, "insert into pgharness.instances (name, project_id) values ('two', %s) returning project", first)
        == "plain"
    )
    tx.execute("update pgharness.instances set description = 'changed'")
    assert orphans(tx) == []


def test_a_rename_reaches_every_table_even_after_a_run_used_the_row(tx: Database) -> None:
    tx.execute("insert into pgharness.projects (name) values ('p'); insert into pgharness.datasets (name) values ('d')")
    tx.execute(
        "insert into pgharness.experiments (name) values ('e'); insert into pgharness.models (name, provider) values ('m', 'simulator')"
    )
    add_instance(tx, project="p", experiment="e", combinations=[("m", "m")])
    tx.execute(
        "update pgharness.cases set dataset = 'd'; update pgharness.rubrics set generator = 'm', author = 'llm' where author = 'zoe'"
    )
    tx.execute(
        "insert into pgharness.rubrics (case_name, author, generator, criteria) values ('trial-1', 'llm', 'm', %s)",
        (_CRITERIA[1:-1],),
    )
    run = start(tx)
    tx.execute(
        "update pgharness.projects set name = 'p2'; update pgharness.datasets set name = 'd2'; update pgharness.experiments set name = name || '2'"
    )
    tx.execute(
        "update pgharness.models set name = 'm2' where name = 'm'; update pgharness.cases set name = name || '-renamed'"
    )
    tx.execute("update pgharness.instances set name = 'renamed'")
    assert orphans(tx) == []
    named = rows(tx, "select project, experiment from pgharness.instances") + rows(
        tx, "select distinct dataset from pgharness.cases"
    )
    assert named == [{"project": "p2", "experiment": "e2"}, {"dataset": "d2"}]
    assert rows(tx, "select distinct instance, generator, grader from pgharness.model_combinations") == [
        {"instance": "renamed", "generator": "m2", "grader": "m2"}
    ]
    assert (
        value(tx, "select string_agg(case_name, ' ' order by case_name) from pgharness.instance_cases")
        == "trial-1-renamed trial-2-renamed"
    )
    assert (
        value(
            tx,
            "select count(*) from pgharness.rubrics where case_name like '%%-renamed' and generator is not distinct from"
            " case when author = 'llm' then 'm2' end",
        )
        == 5
    )
    assert run_of(tx, run)["instance"] == "renamed"
    assert start(tx, "renamed") != run


def test_a_rename_is_not_stopped_by_a_config_that_fitted_when_it_was_written(tx: Database) -> None:
    tx.execute("insert into pgharness.experiments (name) values ('e')")
    tx.execute("""insert into pgharness.instances (name, experiment, config) values ('i', 'e', '{"depth": 9}')""")
    tx.execute(
        """update pgharness.experiments set config_schema = '{"properties": {"depth": {"maximum": 5}}}' where name = 'e'"""
    )
    tx.execute(
        "update pgharness.experiments set name = 'e2' where name = 'e'; update pgharness.instances set name = 'i2'"
    )
    with refused(tx, "PH002", "config.depth", "5"):
        tx.execute("""update pgharness.instances set config = '{"depth": 8}'""")


# -- config

SCHEMA = json.dumps(
    {
        "type": "object",
        "required": ["model"],
        "additionalProperties": False,
        "properties": {
            "model": {"type": "string", "enum": ["small", "large"]},
            "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 0.7},
            "retrieval": {
                "type": "object",
                "default": {},
                "properties": {"depth": {"type": "integer", "maximum": 10, "default": 3}},
            },
        },
    }
)


@pytest.fixture
def configured(tx: Database) -> Database:
    """A database with an experiment whose config has limits and defaults."""
    tx.execute("insert into pgharness.experiments (name, config_schema) values ('limited', %s)", (SCHEMA,))
    return tx


@pytest.mark.parametrize(
    ("config", "texts"),
    [
        ({"model": "small", "temperature": 3}, ["config.temperature", "2", "jsonb_pretty(config_schema)", "limited"]),
        ({"model": "small", "temperature": "hot"}, ["config.temperature", "number"]),
        ({}, ["config", "model"]),
        ({"model": "huge"}, ["config.model", '"small"', '"large"']),
        ({"model": "small", "retrieval": {"depth": 11}}, ["config.retrieval.depth", "10"]),
        ({"model": "small", "colour": 1}, ["config.colour"]),
        ([], ["config", "object"]),
        ({"temperature": -1, "model": 5}, ["config.temperature", "config.model", "2 problem(s)", 'instance "i"']),
    ],
    ids=str,
)
def test_a_config_is_refused_by_the_database_naming_field_and_limit(
    configured: Database, config: object, texts: list[str]
) -> None:
    with refused(configured, "PH002", *texts):
        configured.execute(
            "insert into pgharness.instances (name, experiment, config) values ('i', 'limited', %s)",
            (json.dumps(config),),
        )


def test_a_config_is_completed_with_the_defaults_of_its_schema(configured: Database) -> None:
    add = "insert into pgharness.instances (name, experiment, config) values (%s, 'limited', %s) returning config"
    assert value(configured, add, "i", '{"model": "small"}') == {
        "model": "small",
        "temperature": 0.7,
        "retrieval": {"depth": 3},
    }
    assert value(configured, add, "j", '{"model": "large", "temperature": 0}') == {
        "model": "large",
        "temperature": 0,
        "retrieval": {"depth": 3},
    }


def test_a_config_is_checked_again_when_it_or_its_experiment_changes(configured: Database) -> None:
    configured.execute("""insert into pgharness.instances (name, config) values ('free', '{"anything": 1}')""")
    with refused(configured, "PH002", "config"):
        configured.execute("update pgharness.instances set experiment = 'limited'")
    with refused(configured, "PH002", "config.temperature"):
        configured.execute(
            """update pgharness.instances set experiment = 'limited', config = '{"model": "small", "temperature": 5}'"""
        )
    configured.execute("""update pgharness.instances set experiment = 'limited', config = '{"model": "small"}'""")
    assert value(configured, "select config ->> 'temperature' from pgharness.instances") == "0.7"


@pytest.mark.parametrize(
    "schema",
    ['{"type": "objct"}', '{"maximum": "2"}', '{"properties": {"a": {"minLength": -1}}}', '{"$ref": "#/nowhere"}'],
)
def test_an_experiment_whose_schema_could_not_be_enforced_is_refused(tx: Database, schema: str) -> None:
    for statement in (
        "insert into pgharness.experiments (name, config_schema) values ('odd', %s)",
        "update pgharness.experiments set config_schema = %s where name = 'note_grade'",
    ):
        with refused(tx, "PH002", "config_schema of experiment", "draft 2020-12"):
            tx.execute(statement.encode(), (schema,))


@pytest.mark.parametrize("overlaps", ["{50,50}", "{{1,2},{3,4}}", "[0:1]={1,2}"])
def test_an_overlap_that_would_make_two_notes_of_one_key_is_refused(tx: Database, overlaps: str) -> None:
    with refused(tx, "PH002", 'cycle_transcript_overlaps of instance "i"', overlaps, "note_replications"):
        tx.execute("insert into pgharness.instances (name, cycle_transcript_overlaps) values ('i', %s)", (overlaps,))


# -- rubrics


def criteria(*entries: object) -> str:
    return json.dumps(list(entries))


GOOD = {"criterion": "names the drug", "weight": 10}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "criteria must be a JSON array"),
        ('"text"', "criteria must be a JSON array"),
        ("[]", "criteria is empty"),
        (criteria(*[GOOD] * 1001), "criteria has 1001 entries, more than 1000"),
        (criteria(GOOD, "text"), "criterion 2 is not an object"),
        (criteria(GOOD, None), "criterion 2 is not an object"),
        (criteria({"weight": 1}), 'criterion 1 has no text under "criterion"'),
        (criteria({"criterion": "", "weight": 1}), 'criterion 1 has no text under "criterion"'),
        (criteria({"criterion": 7, "weight": 1}), 'criterion 1 has no text under "criterion"'),
        (criteria(GOOD, GOOD, {"criterion": "c"}), 'criterion 3 has no number under "weight"'),
        (criteria({"criterion": "c", "weight": "10"}), 'criterion 1 has no number under "weight"'),
        (criteria({"criterion": "c", "weight": None}), 'criterion 1 has no number under "weight"'),
        (
            criteria({"criterion": "c", "weight": 100.01}),
            "criterion 1 has weight 100.01, which is not between 0 and 100",
        ),
        (
            criteria(GOOD, {"criterion": "c", "weight": -0.5}),
            "criterion 2 has weight -0.5, which is not between 0 and 100",
        ),
        (criteria({"criterion": "c", "weight": 0}, {"criterion": "d", "weight": 0}), "the weights add up to 0"),
        (criteria({"criterion": "c", "weight": 0.00001}), "the weights add up to 0"),
        ('[{"criterion": "c", "weight": 1e9}]', "criterion 1 has weight 1000000000, which is not between 0 and 100"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_criteria_are_refused_naming_the_criterion(tx: Database, content: str, problem: str) -> None:
    tx.execute("insert into pgharness.cases (name, input) values ('c', '1')")
    with refused(
        tx, "PH002", f'rubric of case "c" by ann: {problem}', '[{"criterion": "names the medication", "weight": 10}]'
    ):
        tx.execute("insert into pgharness.rubrics (case_name, author, criteria) values ('c', 'ann', %s)", (content,))


def test_criteria_at_their_limits_are_taken_and_other_keys_kept(tx: Database) -> None:
    tx.execute("insert into pgharness.cases (name, input) values ('c', '1')")
    for content in (
        criteria(GOOD | {"sense": "positive"}),
        criteria({"criterion": "c", "weight": 0}, {"criterion": "d", "weight": 100}),
        criteria(*[GOOD] * 1000),
        criteria({"criterion": "c", "weight": 0.0001}),
    ):
        kept = value(
            tx,
            "insert into pgharness.rubrics (case_name, author, criteria) values ('c', 'ann', %s) returning criteria",
            content,
        )
        assert kept == json.loads(content)


def test_validation_is_stamped_when_it_is_given(tx: Database) -> None:
    tx.execute("insert into pgharness.cases (name, input) values ('c', '1')")
    tx.execute("set local pgharness.fake_now = '2026-01-01'")
    add = "insert into pgharness.rubrics (case_name, author, criteria, validation, validated_at) values ('c', 'ann', %s, %s, %s) returning validated_at::date::text"
    assert value(tx, add, criteria(GOOD), "accepted", None) == "2026-01-01"
    assert value(tx, add, criteria(GOOD), "accepted", "2020-05-05") == "2020-05-05"
    assert value(tx, add, criteria(GOOD), "not_evaluated", "2020-05-05") is None
    tx.execute("set local pgharness.fake_now = '2026-02-02'")
    change = (
        "update pgharness.rubrics set validation = %s, comments = comments || 'x' returning validated_at::date::text"
    )
    tx.execute("delete from pgharness.rubrics where validation = 'not_evaluated' or validated_at < '2026-01-01'")
    assert value(tx, change, "accepted") == "2026-01-01"
    assert value(tx, change, "refused") == "2026-02-02"
    assert value(tx, change, "not_evaluated") is None
    tx.execute("set local pgharness.fake_now = '2026-03-03'")
    assert value(tx, change, "accepted") == "2026-03-03"


def test_a_case_is_eligible_with_accepted_rubrics_by_two_different_people(tx: Database) -> None:
    tx.execute("insert into pgharness.cases (name, input) select 'c' || i, '1' from generate_series(1, 7) as i")
    add = (
        "insert into pgharness.rubrics (case_name, author, criteria, validation, generator) values (%s, %s, %s, %s, %s)"
    )
    for case, author, validation, generator in [
        *[("c1", author, "accepted", None) for author in ("ann", "bob")],
        *[("c2", author, "accepted", None) for author in ("ann", "ann")],
        *[("c3", author, validation, None) for author, validation in (("ann", "accepted"), ("bob", "refused"))],
        *[("c4", author, validation, None) for author, validation in (("ann", "accepted"), ("bob", "not_evaluated"))],
        *[("c5", author, "accepted", None) for author in ("ann", "LLM")],
        *[("c6", author, "accepted", generator) for author, generator in (("ann", None), ("bob", "simulator"))],
        *[("c7", author, "accepted", None) for author in ("ann", "bob", "cat")],
    ]:
        tx.execute(add.encode(), (case, author, criteria(GOOD), validation, generator))
    assert rows(tx, "select case_name, author_count, authors from pgharness.eligible_cases order by 1") == [
        {"case_name": "c1", "author_count": 2, "authors": ["ann", "bob"]},
        {"case_name": "c7", "author_count": 3, "authors": ["ann", "bob", "cat"]},
    ]
    tx.execute("insert into pgharness.instances (name) values ('i')")
    assert value(tx, "select pgharness.add_cases('i', eligible => true)") == 2
    tx.execute("insert into pgharness.instances (name, rubrics_per_case) values ('three', 3)")
    assert value(tx, "select pgharness.add_cases('three', eligible => true)") == 1


def test_a_parent_rubric_belongs_to_the_same_case(tx: Database) -> None:
    add_cases(tx, 2, authors=("ann",))
    parent = value(tx, "select id from pgharness.rubrics where case_name = 'case-1'")
    add = (
        "insert into pgharness.rubrics (case_name, author, criteria, parent_id) values (%s, 'ann', %s, %s) returning id"
    )
    assert value(tx, add, "case-1", criteria(GOOD), parent)
    with refused(
        tx,
        "PH002",
        f'parent rubric {parent} is not a rubric of case "case-2"',
        "from pgharness.rubrics where case_name = 'case-2'",
    ):
        value(tx, add, "case-2", criteria(GOOD), parent)
    tx.execute("delete from pgharness.cases where name = 'case-1'")
    assert value(tx, "select count(*) from pgharness.rubrics where case_name = 'case-1'") == 0


# -- cases and datasets


def test_the_digest_follows_what_generators_see(tx: Database) -> None:
    add = "insert into pgharness.cases (name, input, target, metadata, digest) values (%s, %s, %s, %s, 'forged') returning digest"
    plain = value(tx, add, "a", '{"x": 1, "y": [2]}', '"t"', "{}")
    assert len(plain) == 64
    assert value(tx, add, "b", '{"y": [2], "x": 1}', '"t"', "{}") == plain
    others = {
        value(tx, add, "c", '{"x": 1, "y": [3]}', '"t"', "{}"),
        value(tx, add, "d", '{"x": 1, "y": [2]}', '"T"', "{}"),
        value(tx, add, "e", '{"x": 1, "y": [2]}', None, "{}"),
        value(tx, add, "f", '{"x": 1, "y": [2]}', '"t"', '{"tag": 1}'),
        value(tx, add, "g", '"a\\nb"', '"c"', "{}"),
        value(tx, add, "h", '"a"', '"b\\nc"', "{}"),
        value(tx, add, "i", '{"x": 1, "y": [2]}', '"t"', '{"tag": 1}'),
    }
    assert len(others | {plain}) == 7
    assert value(tx, "update pgharness.cases set name = 'z' where name = 'a' returning digest") == plain
    assert value(tx, "update pgharness.cases set target = '1' where name = 'z' returning digest") != plain


def test_cases_are_added_once_by_all_ways_of_naming_them(tx: Database) -> None:
    tx.execute("insert into pgharness.datasets (name) values ('d')")
    add_cases(tx, 4)
    tx.execute("update pgharness.cases set dataset = 'd' where name in ('case-1', 'case-2')")
    tx.execute("insert into pgharness.instances (name) values ('i')")
    fourth = value(tx, "select id::text from pgharness.cases where name = 'case-4'")
    assert value(tx, "select pgharness.add_cases('i', dataset => 'd', names => '{case-1,case-3}')") == 1
    assert value(tx, "select pgharness.add_cases('i', names => array['case-1', %s])", fourth) == 1
    assert (
        value(
            tx,
            "select pgharness.add_cases((select id::text from pgharness.instances where name = 'i'), dataset => 'd')",
        )
        == 1
    )
    assert value(tx, "select pgharness.add_cases('i', dataset => 'd')") == 0
    assert (
        value(tx, "select string_agg(case_name, ' ' order by case_id) from pgharness.instance_cases")
        == "case-1 case-2 case-4"
    )
    assert value(tx, "select pgharness.add_cases('i')") == 1
    for call, text in (
        ("add_cases('i', names => '{case-1,nope}')", 'case "nope" does not exist'),
        ("add_cases('i', names => array['case-1', null])", "case is missing"),
        ("add_cases('j')", 'instance "j" does not exist'),
        ("add_cases('i', dataset => 'nope')", 'dataset "nope" does not exist'),
    ):
        with refused(tx, "PH001 PH002", text, "insert into pgharness."):
            tx.execute(f"select pgharness.{call}".encode())


def test_adding_no_case_to_an_empty_instance_says_what_is_missing(tx: Database) -> None:
    tx.execute(
        "insert into pgharness.cases (name, input) values ('c', '1'); insert into pgharness.instances (name) values ('i')"
    )
    tx.execute("insert into pgharness.datasets (name) values ('d')")
    with refused(
        tx,
        "PH002",
        'no case was added to instance "i"',
        "accepted rubrics by 2 different human authors",
        "from pgharness.rubrics",
    ):
        tx.execute("select pgharness.add_cases('i', eligible => true)")
    with refused(tx, "PH002", 'no case was added to instance "i"', "select name, dataset from pgharness.cases"):
        tx.execute("select pgharness.add_cases('i', dataset => 'd')")


# -- models


@pytest.mark.parametrize(
    ("columns", "sqlstate", "texts"),
    [
        (
            {"provider": "metric", "model": "bleu"},
            "PH002",
            ['metric "bleu" does not exist', "exact_match, numeric_match, contains or regex"],
        ),
        (
            {"provider": "metric", "model": "contains", "parameters": '{"case": 1}'},
            "PH002",
            ['metric contains has no option "case"', "ignore_case"],
        ),
        (
            {"provider": "python", "model": "module.function"},
            "PH002",
            ['model "m"', '"module.function" does not name a callable', "my_models.baseline:"],
        ),
        (
            {"provider": "command"},
            "PH002",
            ['model "m": parameters.command is missing', '{"command": ["python", "generate.py"]'],
        ),
        ({"provider": "command", "parameters": '{"command": "run me"}'}, "PH002", ["parameters.command is missing"]),
        ({"provider": "command", "parameters": '{"command": []}'}, "PH002", ["parameters.command is missing"]),
        ({"provider": "openai"}, "PH002", ["does not say which model of openai"]),
        ({"provider": "openai_compatible", "model": "x"}, "PH002", ['model "m" does not say where it is']),
        ({"provider": "openai_compatible", "model": "x", "base_url": "ftp://x"}, "23514", ["base_url", "^https?://"]),
        ({"provider": "openai", "model": "x", "max_concurrency": 0}, "23514", ["max_concurrency is 0"]),
        ({"provider": "openai", "model": "x", "input_usd_per_million": -1}, "23514", ["input_usd_per_million is -1"]),
        ({"provider": "openai", "model": "x", "timeout_seconds": 0}, "23514", ["timeout_seconds is 0"]),
        ({"provider": "chatbot", "model": "x"}, "PH002", ['provider "chatbot"', "openai_compatible"]),
    ],
    ids=lambda part: str(part)[:50],
)
def test_a_model_that_could_never_run_is_refused(
    tx: Database, columns: dict[str, object], sqlstate: str, texts: list[str]
) -> None:
    columns = {"name": "m"} | columns
    marks = ", ".join(["%s"] * len(columns))
    with refused(tx, sqlstate, *texts):
        tx.execute(
            f"insert into pgharness.models ({', '.join(columns)}) values ({marks})".encode(), list(columns.values())
        )


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (
            "insert into pgharness.models (name, provider, parameters) values ('m', 'simulator', '{\"api_key\": \"S3cr3t\"}')",
            "parameters of model",
        ),
        (
            "update pgharness.models set parameters = '{\"X-Api-Key\": \"S3cr3t\"}' where name = 'simulator'",
            "parameters of model",
        ),
        (
            "update pgharness.models set base_url = 'https://me:S3cr3t@host/v1' where name = 'simulator'",
            "base_url of model",
        ),
        (
            'update pgharness.model_combinations set generator_parameters = \'{"token": "S3cr3t"}\'',
            "generator_parameters of combination",
        ),
        (
            'update pgharness.model_combinations set grader_parameters = \'{"Authorization": "S3cr3t"}\'',
            "grader_parameters of combination",
        ),
    ],
)
def test_a_secret_among_parameters_is_refused_and_never_repeated(tx: Database, change: str, where: str) -> None:
    add_instance(tx)
    with pytest.raises(psycopg.Error) as caught, tx.transaction():
        tx.execute(change.encode())
    assert caught.value.sqlstate == "PH002"
    assert where in words(caught.value) and "api_key_env" in words(caught.value)
    assert "S3cr3t" not in words(caught.value)


@pytest.mark.parametrize("pasted", ["sk-proj-S3cr3tS3cr3t", "AIzaS3cr3tS3cr3t", "openai_api_key", "OPENAI_API_SECRET"])
def test_a_key_pasted_for_its_name_is_refused_and_never_repeated(tx: Database, pasted: str) -> None:
    for statement in (
        "insert into pgharness.models (name, provider, model, api_key_env) values ('m', 'openai', 'x', %s)",
        "update pgharness.models set api_key_env = %s where name = 'simulator'",
    ):
        with pytest.raises(psycopg.Error) as caught, tx.transaction():
            tx.execute(statement.encode(), (pasted,))
        assert caught.value.sqlstate == "PH002"
        assert pasted not in words(caught.value) + str(caught.value)
        assert "OPENAI_API_KEY" in words(caught.value)


def test_plugins_are_models_and_metrics_whose_options_only_workers_know(tx: Database) -> None:
    tx.execute(
        "insert into pgharness.instances (name) values ('i');"
        " insert into pgharness.models (name, provider, model) values ('m', 'plugin', 'house'), ('p', 'metric', 'plugin:overlap')"
    )
    tx.execute(
        "insert into pgharness.model_combinations (instance, generator, grader, grader_parameters)"
        """ values ('i', 'm', 'p', '{"anything": 1}')"""
    )
    with refused(tx, "PH002", 'generator "p" is a metric'):
        tx.execute("insert into pgharness.model_combinations (instance, generator) values ('i', 'p')")
    with refused(tx, "PH002", 'metric "plugin:" does not exist', "plugin:NAME"):
        tx.execute("update pgharness.models set model = 'plugin:' where name = 'p'")
    with refused(tx, "PH002", "does not say which model of plugin"):
        tx.execute("insert into pgharness.models (name, provider) values ('n', 'plugin')")


def test_a_metric_grades_and_never_writes(tx: Database) -> None:
    tx.execute(
        "insert into pgharness.instances (name) values ('i'); insert into pgharness.models (name, provider) values ('m', 'simulator')"
    )
    with refused(tx, "PH002", 'generator "exact_match" is a metric', "Use it as the grader"):
        tx.execute("insert into pgharness.model_combinations (instance, generator) values ('i', 'exact_match')")
    with refused(tx, "PH002", 'metric exact_match has no option "tolerance"', "ignore_case, ignore_space"):
        tx.execute(
            "insert into pgharness.model_combinations (instance, generator, grader, grader_parameters)"
            """ values ('i', 'm', 'exact_match', '{"tolerance": 1}')"""
        )
    name = value(
        tx,
        "insert into pgharness.model_combinations (instance, generator, grader) values ('i', 'm', 'contains') returning name",
    )
    assert name == "m -> contains"
    with refused(tx, "PH003", 'model "m" is the generator of a combination', "another name"):
        tx.execute("update pgharness.models set provider = 'metric', model = 'contains' where name = 'm'")
    with refused(tx, "23505", "model_combinations_instance_id_name_key", "m -> contains"):
        tx.execute(
            "insert into pgharness.model_combinations (instance, generator, grader) values ('i', 'm', 'contains')"
        )


# -- freezing


@pytest.fixture
def used(tx: Database) -> int:
    """The run that used everything there is."""
    add_instance(tx, combinations=[("simulator", "simulator"), ("simulator", "exact_match")])
    return start(tx)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            "update pgharness.cases set input = '\"other\"' where name = 'trial-1'",
            'case "trial-1" was used by run "trial/1"',
        ),
        ("update pgharness.cases set target = null", "was used by run"),
        ("update pgharness.cases set metadata = '{\"tag\": 1}'", "its input, target and metadata are frozen"),
        (
            "delete from pgharness.cases where name = 'trial-2'",
            'case "trial-2" was used by run "trial/1" and cannot be deleted',
        ),
        (
            'update pgharness.rubrics set criteria = \'[{"criterion": "c", "weight": 1}]\'',
            "its case, author and criteria are frozen",
        ),
        ("update pgharness.rubrics set author = 'zoe'", "its case, author and criteria are frozen"),
        (
            "update pgharness.rubrics set case_name = 'trial-1' where case_name = 'trial-2'",
            "its case, author and criteria are frozen",
        ),
        ("delete from pgharness.rubrics", 'was used by run "trial/1" and cannot be deleted'),
        ("update pgharness.run_definitions set definition = definition || '{\"seed\": 5}'", "the definition of run"),
        ("update pgharness.run_definitions set grade_stride = 7", "the definition of run"),
        ("delete from pgharness.run_definitions", "the definition of run"),
        ("update pgharness.run_cases set digest = 'x'", "the definition of run"),
        ("delete from pgharness.run_cases", "the definition of run"),
        ("update pgharness.run_rubrics set number = number + 10", "the definition of run"),
        ("delete from pgharness.run_rubrics", "the definition of run"),
        (
            'update pgharness.run_combinations set generator = generator || \'{"model": "other"}\'',
            "the definition of run",
        ),
        ("update pgharness.run_combinations set grade_replications = 5", "the definition of run"),
        ("delete from pgharness.run_combinations", "the definition of run"),
    ],
)
def test_what_a_run_used_cannot_be_changed_or_deleted(tx: Database, used: int, change: str, text: str) -> None:
    with refused(tx, "PH003", text):
        tx.execute(change.encode())
    assert orphans(tx) == []


@pytest.mark.parametrize(
    "change",
    [
        "update pgharness.cases set name = name || ' renamed'",
        "update pgharness.cases set input = input",
        "update pgharness.rubrics set validation = 'refused', comments = 'no longer'",
        "update pgharness.models set name = 'renamed', parameters = '{\"quality\": 1}' where name = 'simulator'",
        "update pgharness.instances set note_replications = 7, note_prompt = 'other', name = 'renamed'",
        "update pgharness.model_combinations set generator_parameters = '{\"quality\": 1}'",
        "delete from pgharness.model_combinations",
        "delete from pgharness.instance_cases",
    ],
)
def test_what_a_run_used_may_be_renamed_retired_and_edited_for_later_runs(tx: Database, used: int, change: str) -> None:
    before = value(tx, "select pgharness.load_run(%s)", used)
    tx.execute(change.encode())
    assert value(tx, "select pgharness.load_run(%s)", used) == before
    assert orphans(tx) == []


def test_what_no_run_used_may_be_changed_and_deleted(tx: Database) -> None:
    add_instance(tx)
    tx.execute("update pgharness.cases set input = '\"other\"', target = null")
    tx.execute(
        """update pgharness.rubrics set criteria = '[{"criterion": "c", "weight": 1}]', author = author || '2'"""
    )
    tx.execute(
        "delete from pgharness.rubrics where case_name = 'trial-1'; delete from pgharness.instances; delete from pgharness.cases"
    )
    assert value(tx, "select count(*) from pgharness.rubrics") == 0


@pytest.mark.parametrize(
    ("table", "constraint"),
    [
        ("models", "run_combinations_generator_id_fkey"),
        ("instances", "runs_instance_fkey"),
        ("experiments", "instances_experiment_fkey"),
        ("projects", "instances_project_fkey"),
        ("datasets", "cases_dataset_fkey"),
    ],
)
def test_what_others_stand_on_cannot_be_deleted(tx: Database, table: str, constraint: str) -> None:
    tx.execute("insert into pgharness.projects (name) values ('p'); insert into pgharness.datasets (name) values ('d')")
    add_instance(tx, project="p")
    tx.execute("update pgharness.cases set dataset = 'd'")
    start(tx)
    tx.execute("delete from pgharness.model_combinations")
    with refused(tx, "23001 23503", constraint):  # a restricting key has a state of its own since Postgres 18
        tx.execute(f"delete from pgharness.{table}".encode())


def test_an_instance_without_runs_takes_its_cases_and_combinations_with_it(tx: Database) -> None:
    add_instance(tx)
    tx.execute("delete from pgharness.instances")
    assert (
        value(tx, "select count(*) from pgharness.instance_cases")
        == value(tx, "select count(*) from pgharness.model_combinations")
        == 0
    )
    assert value(tx, "select count(*) from pgharness.cases") == 2


def test_a_whole_run_may_be_deleted_by_the_owner_with_all_that_it_made(tx: Database, used: int) -> None:
    work_off(tx, register(tx))
    tx.execute("delete from pgharness.runs where id = %s", (used,))
    for table in (
        "run_definitions",
        "run_cases",
        "run_combinations",
        "run_rubrics",
        "notes",
        "grades",
        "calls",
        "failures",
        "logs",
    ):
        assert value(tx, f"select count(*) from pgharness.{table}") == 0, table
    tx.execute("update pgharness.cases set target = null")


def test_the_clock_is_what_a_test_says_or_the_time_itself(tx: Database) -> None:
    assert value(tx, "select abs(extract(epoch from pgharness.clock() - clock_timestamp())) < 1")
    tx.execute("set local pgharness.fake_now = '2026-07-01 12:00+00'")
    assert value(tx, "select pgharness.clock() = '2026-07-01 12:00+00'")
    tx.execute("set local pgharness.fake_now = ''")
    assert value(tx, "select abs(extract(epoch from pgharness.clock() - clock_timestamp())) < 1")
