"""Files of cases, rubrics and models import whole or not at all, and every wrong line is named."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection

import world
from pgharness import database
from pgharness.errors import DatabaseError, ImportRefused
from pgharness.importing import (
    CaseColumns,
    FileOptions,
    Imported,
    import_cases,
    import_models,
    import_rubrics,
)

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
CRITERIA = [{"criterion": "names the cough", "weight": 10}]
REPLACE = FileOptions(replace=True)

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the third-party data is not here (../shared/data)")


@pytest.fixture(scope="module")
def shared(server_url: str, template: str) -> Iterator[Connection[Any]]:
    """A connection to a database that the tests of this module share, with two cases in it."""
    with world.cloned(server_url, template) as url, database.connect(url) as connection:
        connection.execute(
            "insert into pgharness.cases (name, input) values ('there', '\"text\"'), ('used', '\"text\"')"
        )
        yield connection


@pytest.fixture
def connection(url: str) -> Iterator[Connection[Any]]:
    with database.connect(url) as connection:
        yield connection


def jsonl(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    """Write a file of rows: texts as they are, anything else as JSON."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def case_of(connection: Connection[Any], name: str) -> dict[str, Any]:
    (row,) = database.rows(connection, "cases", name=name)
    return row


# -- real files


@needs_data
def test_primock57_imports_and_plans_35_notes_and_140_grades_per_combination(connection: Connection[Any]) -> None:
    assert import_cases(connection, DATA / "primock57" / "cases.jsonl").inserted == 57
    assert import_rubrics(connection, DATA / "primock57" / "rubrics.jsonl").inserted == 27
    assert world.value(connection, "select sum(jsonb_array_length(criteria)) from pgharness.rubrics") == 1351
    assert world.value(connection, "select count(*) from pgharness.eligible_cases") == 7
    # the clinician's own note is what no generator may see
    case = case_of(connection, "day1_consultation01")
    assert case["input"].keys() == {"transcript", "profile"} and case["metadata"].keys() == {
        "reference_note",
        "highlights",
    }

    connection.execute(
        "insert into pgharness.instances (name, note_replications, grade_replications) values ('p', 5, 2)"
    )
    connection.execute("select pgharness.add_cases('p', eligible => true)")
    for grader in ("simulator", "again"):
        if grader == "again":
            connection.execute("insert into pgharness.models (name, provider) values ('again', 'simulator')")
        connection.execute(
            "insert into pgharness.model_combinations (instance, generator, grader) values ('p', 'simulator', %s)",
            (grader,),
        )
    (run,) = database.call(connection, "start_run", instance="p")
    assert (run["notes"], run["grades"]) == (2 * 35, 2 * 140)


@needs_data
def test_primock57_twice_makes_no_duplicates(connection: Connection[Any]) -> None:
    for _ in range(2):
        cases = import_cases(connection, DATA / "primock57" / "cases.jsonl")
        rubrics = import_rubrics(connection, DATA / "primock57" / "rubrics.jsonl")
    assert (cases, rubrics) == (Imported(unchanged=57), Imported(unchanged=27))
    assert world.value(connection, "select count(*) from pgharness.rubrics") == 27


@needs_data
@pytest.mark.parametrize(
    ("file", "columns", "count", "name", "has"),
    [
        (
            "gsm8k/test.jsonl",
            CaseColumns(dataset="gsm8k", inputs=("question",), target="answer"),
            1319,
            "gsm8k/0001",
            {},
        ),
        (
            "humaneval/HumanEval.jsonl.gz",
            CaseColumns(dataset="humaneval", name="task_id", inputs=("prompt",), target="canonical_solution"),
            164,
            "HumanEval/0",
            {"entry_point", "test"},
        ),
        (
            "mts-dialog/MTS-Dialog-ValidationSet.csv",
            CaseColumns(dataset="mts", inputs=("dialogue",), target="section_text"),
            100,
            "mts/0001",
            {"ID", "section_header"},
        ),
    ],
)
def test_a_published_file_imports_with_nothing_but_its_columns_named(
    connection: Connection[Any], file: str, columns: CaseColumns, count: int, name: str, has: set[str]
) -> None:
    assert import_cases(connection, DATA / file, columns).inserted == count
    case = case_of(connection, name)
    assert case["dataset"] == columns.dataset and case["metadata"].keys() == set(has)
    assert isinstance(case["input"], str) and isinstance(case["target"], str)
    assert import_cases(connection, DATA / file, columns) == Imported(unchanged=count)


# -- what a row may be


def test_a_column_that_nobody_named_goes_to_the_metadata_and_never_to_the_input(
    connection: Connection[Any], tmp_path: Path
) -> None:
    row = {
        "name": "c",
        "transcript": [{"speaker": "A", "text": "hi"}],
        "profile": "p",
        "reference_note": "secret",
        "metadata": {"k": 1},
    }
    import_cases(connection, jsonl(tmp_path, row))
    case = case_of(connection, "c")
    assert case["input"] == {"transcript": row["transcript"], "profile": "p"}
    assert case["metadata"] == {"reference_note": "secret", "k": 1} and case["target"] is None


def test_several_inputs_become_one_object_and_a_single_one_stays_what_it_is(
    connection: Connection[Any], tmp_path: Path
) -> None:
    file = jsonl(tmp_path, {"id": 7, "a": "x", "b": [1], "answer": 4})
    import_cases(connection, file, CaseColumns(name="id", inputs=("a", "b"), target="answer"))
    assert (case_of(connection, "7")["input"], case_of(connection, "7")["target"]) == ({"a": "x", "b": [1]}, 4)
    import_cases(connection, file, CaseColumns(dataset="d", inputs=("b",)))
    assert case_of(connection, "d/0001")["input"] == [1] and case_of(connection, "d/0001")["metadata"] == {
        "id": 7,
        "a": "x",
        "answer": 4,
    }


def test_a_csv_cell_is_json_only_where_json_belongs(connection: Connection[Any], tmp_path: Path) -> None:
    file = tmp_path / "cases.csv"
    file.write_bytes(
        b"\xef\xbb\xbfname,input,target,metadata,other\r\n"
        b'c1,"{""a"": 1}","[1, 2]","{""k"": ""v""}","[3]"\r\n'
        b'c2,"[laughs] two\r\nlines, ""quoted""",,,\r\n'
    )
    assert import_cases(connection, file).inserted == 2
    first, second = case_of(connection, "c1"), case_of(connection, "c2")
    assert (first["input"], first["target"], first["metadata"]) == ({"a": 1}, [1, 2], {"k": "v", "other": "[3]"})
    assert (second["input"], second["target"]) == ('[laughs] two\r\nlines, "quoted"', None)


def test_standard_input_and_gzip_are_files_too(
    connection: Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b'{"name": "c", "input": "\xc3\xa9"}\n\n'
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(text))
    assert import_cases(connection, tmp_path / "c.jsonl.gz").inserted == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert import_cases(connection, "-", options=FileOptions(file_format="jsonl")).unchanged == 1


def test_rubrics_keep_their_order_parents_validation_and_every_key_of_a_criterion(
    connection: Connection[Any], tmp_path: Path
) -> None:
    import_cases(connection, jsonl(tmp_path, {"name": "c", "input": "x"}))
    criteria = [{"criterion": "a", "weight": 5, "section": "PMH"}, {"criterion": "b", "weight": 0}]
    file = jsonl(
        tmp_path,
        {"case": "c", "author": "llm", "generator": "simulator", "criteria": CRITERIA},
        {
            "case": "c",
            "author": "ann",
            "parent": "llm",
            "validation": "accepted",
            "validated_at": "2025-01-31T12:00:00Z",
            "criteria": criteria,
        },
        {
            "case": "c",
            "author": "ann",
            "parent": "llm",
            "validation": "accepted",
            "validated_at": "2025-01-31T12:00:00Z",
            "criteria": criteria,
        },
    )
    assert import_rubrics(connection, file) == Imported(inserted=2, unchanged=1)
    generated, human = database.rows(connection, "rubrics", order="id")
    assert (human["parent_id"], human["criteria"], human["is_human"]) == (generated["id"], criteria, True)
    assert human["validated_at"].isoformat() == "2025-01-31T12:00:00+00:00" and generated["is_human"] is False


def test_replace_takes_over_a_rubrics_validation_and_nothing_else_does(
    connection: Connection[Any], tmp_path: Path
) -> None:
    import_cases(connection, jsonl(tmp_path, {"name": "c", "input": "x"}))
    rubric = {"case": "c", "author": "ann", "criteria": CRITERIA}
    import_rubrics(connection, jsonl(tmp_path, rubric))
    accepted = jsonl(tmp_path, {**rubric, "validation": "accepted"})
    assert import_rubrics(connection, accepted) == Imported(unchanged=1)
    assert import_rubrics(connection, accepted, REPLACE) == Imported(updated=1)
    assert database.rows(connection, "rubrics")[0]["validation"] == "accepted"


def test_models_come_from_csv_with_their_numbers(connection: Connection[Any], tmp_path: Path) -> None:
    file = tmp_path / "models.csv"
    file.write_text(
        "name,provider,model,base_url,api_key_env,parameters,is_reasoning,max_concurrency,input_usd_per_million\n"
        'gpt,openai,gpt-4.1,,OPENAI_API_KEY,"{""temperature"": 0}",true,8,2.50\n'
        "local,openai_compatible,qwen,http://127.0.0.1:8000/v1,,,,,\n"
    )
    assert import_models(connection, file) == Imported(inserted=2)
    gpt, local = (database.rows(connection, "models", name=name)[0] for name in ("gpt", "local"))
    assert (gpt["parameters"], gpt["is_reasoning"], gpt["max_concurrency"]) == ({"temperature": 0}, True, 8)
    assert float(gpt["input_usd_per_million"]) == 2.5 and (local["timeout_seconds"], local["parameters"]) == (120, {})
    assert import_models(connection, file) == Imported(unchanged=2)
    # what a file does not say stays: here the price that somebody set by hand
    connection.execute("update pgharness.models set output_usd_per_million = 10 where name = 'gpt'")
    assert import_models(connection, file) == Imported(unchanged=2)


# -- what is there already


def test_another_content_under_a_name_is_refused_or_replaced(connection: Connection[Any], tmp_path: Path) -> None:
    import_cases(connection, jsonl(tmp_path, {"name": "c", "input": "old", "target": 1}))
    file = jsonl(tmp_path, {"name": "new", "input": "x"}, {"name": "c", "input": "new", "target": 2})
    with pytest.raises(ImportRefused) as refused:
        import_cases(connection, file)
    assert 'line 2: name: case "c" exists with other input and target' in str(refused.value.detail)
    assert "another name" in str(refused.value.detail) and "--replace" in str(refused.value.detail)
    assert not database.rows(connection, "cases", name="new")
    assert import_cases(connection, file, options=REPLACE) == Imported(inserted=1, updated=1)
    assert case_of(connection, "c")["input"] == "new"


def test_replacing_a_case_that_a_run_used_is_refused(connection: Connection[Any], tmp_path: Path) -> None:
    import_cases(connection, jsonl(tmp_path, {"name": "c", "input": "old", "target": "1"}))
    connection.execute("insert into pgharness.instances (name) values ('i')")
    connection.execute("insert into pgharness.instance_cases (instance, case_name) values ('i', 'c')")
    connection.execute(
        "insert into pgharness.model_combinations (instance, generator, grader) values ('i', 'simulator', 'contains')"
    )
    database.call(connection, "start_run", instance="i")
    for change in ({"input": "new"}, {"target": "2"}, {"tag": "x"}):  # a tag is metadata, which prompts may use
        with pytest.raises(ImportRefused) as refused:
            import_cases(
                connection, jsonl(tmp_path, {"name": "c", "input": "old", "target": "1"} | change), options=REPLACE
            )
        assert 'run "i/1" used it' in str(refused.value.detail)


@pytest.mark.parametrize("replace", [False, True])
def test_a_name_twice_in_one_file_never_replaces_itself(
    connection: Connection[Any], tmp_path: Path, replace: bool
) -> None:
    options = FileOptions(replace=replace)
    same = jsonl(tmp_path, {"name": "c", "input": "x"}, {"name": "d", "input": "x"}, {"name": "c", "input": "x"})
    assert import_cases(connection, same, options=options) == Imported(inserted=2, unchanged=1)
    other = jsonl(tmp_path, {"name": "e", "input": "x"}, {"name": "f", "input": "x"}, {"name": "e", "input": "y"})
    with pytest.raises(ImportRefused) as refused:
        import_cases(connection, other, options=options)
    assert refused.value.detail == "line 3: name: is also on line 1, with other content"


def test_a_dry_run_says_what_would_happen_and_changes_nothing(connection: Connection[Any], tmp_path: Path) -> None:
    before = world.contents(connection)
    file = jsonl(tmp_path, {"name": "c", "input": "x"})
    assert import_cases(connection, file, CaseColumns(dataset="new"), FileOptions(dry_run=True)) == Imported(inserted=1)
    assert world.contents(connection) == before


def test_progress_is_told_in_rows(connection: Connection[Any], tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    file = jsonl(tmp_path, *({"name": f"c{i}", "input": "x"} for i in range(2500)))
    options = FileOptions(on_progress=lambda done, total: told.append((done, total)))
    assert import_cases(connection, file, options=options).inserted == 2500
    assert told == [(1000, 2500), (2000, 2500), (2500, 2500)]


# -- what is refused

RUBRIC = {"case": "there", "author": "ann", "criteria": CRITERIA}
MODEL = {"name": "m", "provider": "openai", "model": "x"}
SECRET = "sk-proj-AAAABBBBCCCCDDDD"
WRONG_CASES: list[tuple[Any, str]] = [
    ("{not json", "line 2: is not JSON"),
    ('["a", "list"]', "line 2: is not a JSON object"),
    ('{"name": "n", "input": NaN}', "line 2: is not JSON: NaN"),
    ('{"name": "n", "input": 1e999}', "line 2: cannot be stored as JSON"),
    ('{"name": "n", "input": "\\ud800"}', "line 2: holds half of a surrogate pair"),
    ('{"name": "n", "input": "a\\u0000b"}', "line 2: input: holds the character U+0000"),
    ('{"name": "n", "input": {"\\u0000": 1}}', "line 2: input: holds the character U+0000"),
    ("[" * 100_000, "line 2: is not JSON"),
    ({"input": "x"}, "line 2: name: is missing; say which column holds it with --name"),
    ({"name": "", "input": "x"}, "line 2: name: is not a name"),
    ({"name": None, "input": "x"}, "line 2: name: is not a name"),
    ({"name": True, "input": "x"}, "line 2: name: is not a name"),
    ({"name": "n" * 501, "input": "x"}, "line 2: name: has 501 characters"),
    (
        {"name": "n", "question": "x"},
        "line 2: input: is missing; the row has name, question; say which column is the input",
    ),
    ({"name": "n", "input": ""}, "line 2: input: is empty"),
    ({"name": "n", "input": None}, "line 2: input: is empty"),
    ({"name": "n", "input": "x", "transcript": "y"}, "line 2: input: there is a transcript as well"),
    ({"name": "n", "transcript": []}, "line 2: transcript: is empty"),
    ({"name": "n", "transcript": [{"speaker": "A"}]}, 'line 2: transcript: turn 1 is not an object with a "text"'),
    ({"name": "n", "transcript": 5}, "line 2: transcript: is neither a text nor a list of turns"),
    ({"name": "n", "input": "x", "metadata": [1]}, "line 2: metadata: is not a JSON object"),
    ({"name": "n", "input": "x", "k": 1, "metadata": {"k": 2}}, "line 2: metadata: has k, which is a column as well"),
    ({"name": "n", "input": "x", "dataset": 5}, "line 2: dataset: is not a name"),
    ({"name": "there", "input": "other"}, 'line 2: name: case "there" exists with other input'),
]
WRONG_RUBRICS: list[tuple[Any, str]] = [
    ({**RUBRIC, "case": "nowhere"}, 'line 2: case: case "nowhere" does not exist; import the cases first'),
    ({"case": "there", "criteria": CRITERIA}, "line 2: author: is missing"),
    (
        {**RUBRIC, "validation": "approved"},
        "line 2: validation: input should be 'not_evaluated', 'accepted' or 'refused'",
    ),
    ({**RUBRIC, "validated_at": "2025-01-31"}, "line 2: validated_at: input should have timezone info"),
    ({**RUBRIC, "criteria": "cough"}, "line 2: criteria: input should be a valid list"),
    ({**RUBRIC, "criteria": []}, "line 2: criteria: criteria is empty"),
    ({**RUBRIC, "criteria": [{"criterion": "a"}]}, 'line 2: criteria: criterion 1 has no number under "weight"'),
    ({**RUBRIC, "criteria": [{"criterion": "a", "weight": 101}]}, "line 2: criteria: criterion 1 has weight 101"),
    ({**RUBRIC, "criteria": [{"criterion": "a", "weight": 0}]}, "line 2: criteria: the weights add up to 0"),
    ({**RUBRIC, "generator": "no/model"}, 'line 2: generator: model "no/model" does not exist'),
    ({**RUBRIC, "parent": "bob"}, 'line 2: parent: case "there" has no rubric by "bob"'),
    ({**RUBRIC, "score": 5}, "line 2: score: is no column of these; they are case, author, validation"),
]
WRONG_MODELS: list[tuple[Any, str]] = [
    ({"name": "m", "model": "x"}, "line 2: provider: is missing"),
    ({**MODEL, "provider": "openay"}, "line 2: provider: input should be 'openai'"),
    ({"name": "m", "provider": "openai"}, "line 2: model: is missing"),
    ({**MODEL, "max_concurrency": "many"}, "line 2: max_concurrency: input should be a valid integer"),
    ({**MODEL, "max_concurrency": 0}, "line 2: max_concurrency: input should be greater than 0"),
    (
        {**MODEL, "input_usd_per_million": -1},
        "line 2: input_usd_per_million: input should be greater than or equal to 0",
    ),
    ({**MODEL, "timeout_seconds": 0}, "line 2: timeout_seconds: input should be greater than 0"),
    ({**MODEL, "parameters": "hot"}, "line 2: parameters: input should be a valid dictionary"),
    ({**MODEL, "provider": "openai_compatible"}, "line 2: base_url: is missing"),
    ({**MODEL, "base_url": "localhost:8000"}, "line 2: base_url: is no http or https address"),
    ({**MODEL, "base_url": f"https://u:{SECRET}@host/"}, "line 2: base_url: holds a user or password"),
    ({**MODEL, "api_key": SECRET}, "line 2: api_key: keys are never stored"),
    ({**MODEL, "Key": SECRET}, "line 2: Key: keys are never stored"),
    ({**MODEL, "parameters": {"api_key": SECRET}}, "line 2: parameters: hold a key"),
    ({**MODEL, "api_key_env": SECRET}, 'line 2: api_key_env of model "m" is not the name of an environment variable'),
    ({"name": "m", "provider": "command"}, 'line 2: model "m": parameters.command is missing'),
    ({"name": "m", "provider": "metric", "model": "bleu"}, 'line 2: metric "bleu" does not exist'),
    ({"name": "m", "provider": "python", "model": "nothing"}, 'line 2: model "m": "nothing" does not name a callable'),
    (
        {"name": "simulator", "provider": "simulator", "max_concurrency": 3},
        'line 2: name: model "simulator" exists with other values',
    ),
]


@pytest.mark.parametrize(
    ("importer", "good", "wrong", "words"),
    [(import_cases, {"name": "good", "input": "x"}, *wrong) for wrong in WRONG_CASES]
    + [(import_rubrics, {**RUBRIC, "author": "good"}, *wrong) for wrong in WRONG_RUBRICS]
    + [(import_models, {"name": "good", "provider": "simulator"}, *wrong) for wrong in WRONG_MODELS],
)
def test_a_wrong_row_is_named_and_nothing_changes(
    shared: Connection[Any], tmp_path: Path, importer: Any, good: Any, wrong: Any, words: str
) -> None:
    before = world.contents(shared)
    file = jsonl(tmp_path, good, wrong)
    with pytest.raises(ImportRefused) as refused:
        importer(shared, file)
    assert str(refused.value) == "rows.jsonl has 1 wrong row; nothing was imported"
    assert refused.value.detail is not None and refused.value.detail.startswith(words)
    assert SECRET not in refused.value.detail and refused.value.hint
    assert world.contents(shared) == before


@pytest.mark.parametrize(
    ("name", "content", "words", "remedy"),
    [
        ("rows.txt", b"{}", "does not say whether it is JSONL or CSV", "--format"),
        ("rows.jsonl", b"", "has no rows", "one JSON object a line"),
        ("rows.csv", b"name,input\n", "has no rows", "rows"),
        ("rows.jsonl", b'{"name": "a", "input": "\xff"}\n', "line 1 is not UTF-8", "UTF-8"),
        ("rows.csv", "näme,input\n".encode("utf-16"), "line 1 is not UTF-8", "UTF-8"),
        ("rows.jsonl.gz", b"plain text", "is not a gzip file", ".gz"),
        (
            "rows.jsonl.gz",
            gzip.compress(b'{"name": "a", "input": "b"}\n' * 1000)[:-20],
            "is cut off or damaged",
            "again",
        ),
        ("rows.csv", b"name,,input\na,b,c\n", "column 2 has no name", "name of its own"),
        ("rows.csv", b"name,input,input\na,b,c\n", '"input" is twice', "name of its own"),
        ("rows.csv", b'name,input\na,"b" c\n', "line 2 is not CSV", "Quote"),
        ("rows.csv", b"name,input\na,b\nc\n", "has 1 wrong row", "--dry-run"),
        (None, b"", "cannot be read", "path"),
    ],
)
def test_a_file_that_cannot_be_read_says_so_and_what_to_do(
    shared: Connection[Any], tmp_path: Path, name: str | None, content: bytes, words: str, remedy: str
) -> None:
    before = world.contents(shared)
    path = tmp_path / (name or "missing.jsonl")
    if name:
        path.write_bytes(content)
    with pytest.raises(ImportRefused) as refused:
        import_cases(shared, path)
    assert words in str(refused.value) and remedy in str(refused.value.hint)
    assert world.contents(shared) == before


def test_a_mapped_column_that_is_missing_is_named(shared: Connection[Any], tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"question": "x"})
    for columns, words in [
        (CaseColumns(dataset="d", inputs=("prompt",)), "line 1: prompt: is missing; the row has question"),
        (CaseColumns(dataset="d", inputs=("question",), target="answer"), "line 1: answer: is missing"),
        (CaseColumns(name="id", inputs=("question",)), "line 1: id: is missing"),
    ]:
        with pytest.raises(ImportRefused) as refused:
            import_cases(shared, file, columns)
        assert str(refused.value.detail).startswith(words)


def test_all_problems_are_told_at_once_up_to_twenty(shared: Connection[Any], tmp_path: Path) -> None:
    some = jsonl(tmp_path, {"name": "n"}, {"name": "ok", "input": "x"}, {"name": "there", "input": "other"}, "{")
    with pytest.raises(ImportRefused) as refused:
        import_cases(shared, some)
    assert [line.split(":")[0] for line in str(refused.value.detail).splitlines()] == ["line 1", "line 3", "line 4"]
    with pytest.raises(ImportRefused) as refused:
        import_cases(shared, jsonl(tmp_path, *({"name": str(i)} for i in range(50))))
    assert len(str(refused.value.detail).splitlines()) == 20 and "at least 20 wrong rows" in str(refused.value)


def test_a_csv_problem_is_named_by_the_line_on_which_its_row_starts(shared: Connection[Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('name,input\na,"two\nlines"\nb,\n')
    with pytest.raises(ImportRefused) as refused:
        import_cases(shared, file)
    assert refused.value.detail == "line 4: input: is empty"


# -- who may


def test_an_author_imports_and_a_reader_cannot(connection: Connection[Any], tmp_path: Path) -> None:
    if not world.value(connection, "select exists (select from pg_roles where rolname = 'pgharness_author')"):
        pytest.skip("roles cannot be created on this server")
    cases = jsonl(tmp_path, {"name": "c", "input": "x"})
    connection.execute("set role pgharness_reader")
    with pytest.raises(DatabaseError, match="permission denied"):
        import_cases(connection, cases)
    connection.execute("set role pgharness_author")
    assert import_cases(connection, cases, CaseColumns(dataset="d")).inserted == 1
    assert import_rubrics(connection, jsonl(tmp_path, {**RUBRIC, "case": "c"})).inserted == 1
    assert import_models(connection, jsonl(tmp_path, MODEL)).inserted == 1


def test_two_imports_at_once_make_no_duplicates(url: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path, *({"name": f"c{i}", "input": "x"} for i in range(10)))
    with psycopg.connect(url) as first, database.connect(url) as second, database.connect(url) as third:
        first.execute("select 1")  # in a transaction of its own, so that what it imports is not committed yet
        assert import_cases(first, file).inserted == 10
        second.execute("set lock_timeout = '100ms'")
        with pytest.raises(psycopg.OperationalError, match="lock timeout"):
            import_cases(second, file)
        first.commit()
        assert import_cases(third, file) == Imported(unchanged=10)
