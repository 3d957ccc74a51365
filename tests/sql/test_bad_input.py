"""Wrong input through SQL: an error that names what is wrong and what to type instead, and nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from world import add_instance, contents, lost, note, orphans, record, register, start, work_off

Database = Connection[Any]

# statement; state; what the message names; what the hint or detail says
WRONG = [
    # names and ids that are not there
    ("insert into pgharness.instances (name, project) values ('i', 'lab')", "PH001", 'project "lab" does not exist', "insert into pgharness.projects"),
    ("insert into pgharness.instances (name, project_id) values ('i', 999)", "PH001", "project with id 999 does not exist", "select id, name from pgharness.projects"),
    ("insert into pgharness.instances (name, experiment) values ('i', 'rag')", "PH001", 'experiment "rag" does not exist', "Use 'note_grade'"),
    ("insert into pgharness.instances (name, experiment) values ('i', null)", "PH002", "experiment is missing", "Use 'note_grade'"),
    ("insert into pgharness.cases (name, input, dataset) values ('c', '1', 'gsm8k')", "PH001", 'dataset "gsm8k" does not exist', "There is no dataset yet."),
    ("insert into pgharness.cases (name, input, dataset_id) values ('c', '1', 999)", "PH001", "dataset with id 999 does not exist", "pgharness.datasets"),
    ("insert into pgharness.rubrics (case_name, author, criteria) values ('no-case', 'a', '[]')", "PH001", 'case "no-case" does not exist', "Some that exist: "),
    ("insert into pgharness.instance_cases (instance, case_name) values ('trail', 'trial-1')", "PH001", 'instance "trail" does not exist', "trial"),
    ("insert into pgharness.instance_cases (instance) values ('trial')", "PH002", "case is missing", "insert into pgharness.cases"),
    ("insert into pgharness.model_combinations (instance, generator) values ('trial', 'gpt-9')", "PH001", 'model "gpt-9" does not exist', "insert into pgharness.models"),
    ("insert into pgharness.model_combinations (instance, generator, grader_id) values ('trial', 'simulator', 999)", "PH001", "model with id 999", "pgharness.models"),
    ("insert into pgharness.model_combinations (instance) values ('trial')", "PH002", "model is missing", "insert into pgharness.models"),
    ("select pgharness.add_cases('trail')", "PH001", 'instance "trail" does not exist', "Some that exist: "),
    ("select pgharness.add_cases('trial', names => '{trial-1,trial-99}')", "PH001", 'case "trial-99" does not exist', "insert into pgharness.cases"),
    ("select pgharness.add_cases('trial', dataset => 'gsm8k')", "PH001", 'dataset "gsm8k" does not exist', "insert into pgharness.datasets"),
    ("select pgharness.add_cases('empty', eligible => true, names => '{untargeted-1}')", "PH002", 'no case was added to instance "empty"', "accepted rubrics by 2"),
    # config and schemas
    ("insert into pgharness.instances (name, experiment, config) values ('i', 'limited', '{\"depth\": 7}')", "PH002", "config.depth", "config_schema"),
    ("insert into pgharness.instances (name, experiment, config) values ('i', 'limited', '{\"deep\": 1}')", "PH002", "config.deep", "1 problem(s)"),
    ("insert into pgharness.instances (name, experiment, config) values ('i', 'limited', '[1]')", "PH002", "config", 'instance "i"'),
    ("update pgharness.instances set experiment = 'limited', config = '{\"depth\": \"a\"}' where name = 'trial'", "PH002", "config.depth", "config_schema"),
    ("insert into pgharness.experiments (name, config_schema) values ('e', '{\"type\": \"nubmer\"}')", "PH002", 'config_schema of experiment "e"', "draft 2020-12"),
    ("insert into pgharness.instances (name, cycle_transcript_overlaps) values ('i', '{50,100,50}')", "PH002", "{50,100,50}", "note_replications"),
    ("insert into pgharness.instances (name, cycle_transcript_overlaps) values ('i', '{1,null}')", "PH002", "{1,NULL}", "Name each overlap once"),
    # rubrics
    ("insert into pgharness.rubrics (case_name, author, criteria) values ('trial-1', 'a', '{}')", "PH002", "criteria must be a JSON array", '"weight": 10'),
    ("insert into pgharness.rubrics (case_name, author, criteria) values ('trial-1', 'a', '[]')", "PH002", "criteria is empty", '"weight": 10'),
    ("insert into pgharness.rubrics (case_name, author, criteria) values ('trial-1', 'a', '[{\"criterion\": \"c\", \"weight\": 101}]')", "PH002", "criterion 1 has weight 101", "array such as"),
    ("insert into pgharness.rubrics (case_name, author, criteria) values ('trial-1', 'a', '[{\"weight\": 1}]')", "PH002", 'no text under "criterion"', "array such as"),
    ("update pgharness.rubrics set criteria = '[{\"criterion\": \"c\", \"weight\": 0}]'", "PH002", "the weights add up to 0", "array such as"),
    ("insert into pgharness.rubrics (case_name, author, criteria, parent_id) values ('trial-1', 'a', '[{\"criterion\": \"c\", \"weight\": 1}]', 999)", "PH002", "parent rubric 999", "select id, author"),
    # models
    ("insert into pgharness.models (name, provider, model) values ('m', 'metric', 'bleu')", "PH002", 'metric "bleu" does not exist', "exact_match"),
    ("insert into pgharness.models (name, provider, model) values ('m', 'python', 'f')", "PH002", '"f" does not name a callable', "package.module:function"),
    ("insert into pgharness.models (name, provider) values ('m', 'command')", "PH002", 'model "m": parameters.command is missing', '["python", "generate.py"]'),
    ("insert into pgharness.models (name, provider, model, api_key_env) values ('m', 'openai', 'x', 'sk-123')", "PH002", 'api_key_env of model "m"', "OPENAI_API_KEY"),
    ("update pgharness.models set parameters = '{\"pattern\": 1}' where name = 'contains'", "PH002", 'metric contains has no option "pattern"', "ignore_case"),
    ("update pgharness.models set provider = 'metric', model = 'regex' where name = 'simulator'", "PH003", 'model "simulator" is the generator', "another name"),
    ("insert into pgharness.model_combinations (instance, generator) values ('trial', 'regex')", "PH002", 'generator "regex" is a metric', "select name from pgharness.models"),
    ("insert into pgharness.model_combinations (instance, generator, grader, grader_parameters) values ('trial', 'simulator', 'regex', '{\"x\": 1}')", "PH002", 'no option "x"', "pattern, ignore_case"),
    ("insert into pgharness.models (name, provider, model) values ('m', 'gpt', 'x')", "PH002", 'provider "gpt" of model "m" does not exist', "openai_compatible"),
    ("insert into pgharness.models (name, provider) values ('m', 'openai')", "PH002", 'model "m" does not say which model of openai', "own name"),
    ("insert into pgharness.models (name, provider) values ('m', 'hedge')", "PH002", 'model "m": a hedge needs members, in an array', '"members": ['),
    ("insert into pgharness.models (name, provider, parameters) values ('m', 'ensemble', '{\"members\": \"gpt\"}')", "PH002", "an ensemble needs members, in an array", '"members": ['),
    ("update pgharness.models set input_usd_per_million = 1 where name = 'panel'", "PH002", 'model "panel": input_usd_per_million of an ensemble would do nothing', "of those"),
    ("update pgharness.models set base_url = 'http://x/v1' where name = 'panel'", "PH002", 'model "panel": base_url of an ensemble', "of those"),
    ("update pgharness.models set model = 'gpt' where name = 'panel'", "PH002", 'model "panel": model of an ensemble', "of those"),
    ("update pgharness.models set api_key_env = 'A_KEY' where name = 'panel'", "PH002", 'model "panel": api_key_env of an ensemble', "of those"),
    ("insert into pgharness.model_prices (model, input_usd_per_million) values ('panel', 1)", "PH002", 'model "panel" has no price of its own', "model_members"),
    ("insert into pgharness.model_prices (model) values ('simulator')", "PH002", 'price of model "simulator"', "0 is free"),
    ("delete from pgharness.models where name = 'member'", "PH003", 'model "member" is a member of "panel"', "Delete that first"),
    # what a run used
    ("update pgharness.cases set input = '\"x\"' where name = 'trial-1'", "PH003", 'case "trial-1" was used by run "trial/1"', "Insert a new case"),
    ("delete from pgharness.cases where name = 'trial-1'", "PH003", 'case "trial-1" was used by run "trial/1"', "delete from pgharness.instance_cases"),
    ("update pgharness.rubrics set author = 'x' where case_name = 'trial-1'", "PH003", "case, author and criteria are frozen", "parent_id"),
    ("delete from pgharness.rubrics where case_name = 'trial-1'", "PH003", 'was used by run "trial/1"', "validation = 'refused'"),
    ("update pgharness.run_definitions set definition = '{}'", "PH003", "is frozen", "start a new run"),
    ("update pgharness.run_combinations set generator = '{}'", "PH003", "is frozen", "start a new run"),
    # starting
    ("select pgharness.start_run('trail')", "PH001", 'instance "trail" does not exist', "insert into pgharness.instances"),
    ("select pgharness.start_run(null)", "PH002", "instance is missing", "insert into pgharness.instances"),
    ("select pgharness.start_run('empty')", "PH003", 'instance "empty" has no cases', "select pgharness.add_cases('empty'"),
    ("select pgharness.start_run('bare')", "PH003", 'instance "bare" has no model combinations', "insert into pgharness.model_combinations"),
    ("select pgharness.start_run('lacking')", "PH003", '1 of the cases of instance "lacking" lack accepted rubrics', "lacking-1"),
    ("select pgharness.start_run('untargeted')", "PH003", '2 of the cases of instance "untargeted" have no target', "untargeted-1, untargeted-2"),
    ("select pgharness.start_run('trial', kind => 'milestone', idempotency_key => 'k')", "PH004", 'idempotency key "k" already started run "trial/1"', "another key"),
    ("select pgharness.rerun('trial/1', idempotency_key => 'k')", "PH004", 'idempotency key "k"', "another key"),
    ("insert into pgharness.runs (instance) values ('trail')", "PH001", 'instance "trail" does not exist', "Some that exist: "),
    ("insert into pgharness.runs (instance_id) values (999)", "PH001", "instance with id 999 does not exist", "pgharness.instances"),
    ("insert into pgharness.runs (rerun_of_id) values (999)", "PH001", "run with id 999 does not exist", "pgharness.runs"),
    ("insert into pgharness.runs (kind) values ('trial')", "PH002", "instance is missing", "insert into pgharness.instances"),
    ("select pgharness.start_run('trial', kind => 'smoke')", "PH002", 'kind of a run cannot be "smoke"', "trial or milestone"),
    ("select pgharness.start_run('trial', priority => 5000)", "PH002", 'priority of a run cannot be "5000"', "-1000 to 1000"),
    ("select pgharness.start_run('trial', budget_usd => -1)", "PH002", 'budget_usd of a run cannot be "-1"', "or null"),
    ("select pgharness.start_run('trial', budget_usd => 0)", "PH002", 'budget_usd of a run cannot be "0"', "or null"),
    ("select pgharness.start_run('trial', budget_usd => 1e-9)", "PH002", '"1e-09"', "from 0.000001"),
    ("select pgharness.start_run('trial', budget_usd => 1e9)", "PH002", '"1000000000"', "to 999999"),
    ("select pgharness.start_run('trial', budget_usd => 'NaN')", "PH002", '"NaN"', "USD"),
    ("select pgharness.start_run('trial', budget_usd => 'infinity')", "PH002", '"Infinity"', "USD"),
    ("select pgharness.start_run('trial', response_cache => 'bogus')", "PH002", 'response_cache of a run cannot be "bogus"', "replay"),
    ("select pgharness.start_run('trial', batch_deadline_seconds => -5)", "PH002", 'batch_deadline_seconds of a run cannot be "-5"', "0 to ask live"),
    ("select pgharness.start_run('trial', max_concurrency => 0)", "PH002", 'max_concurrency of a run cannot be "0"', "from 1 on"),
    ("insert into pgharness.runs (instance, response_cache) values ('trial', 'bogus')", "PH002", 'response_cache of a run cannot be "bogus"', "replay"),
    ("select pgharness.rerun('trial/1', response_cache => 'bogus')", "PH002", 'response_cache of a run cannot be "bogus"', "replay"),
    # columns
    ("insert into pgharness.projects (name) values ('')", "23514", 'project "": name ', "pgharness.projects"),
    ("insert into pgharness.instances (name, note_replications) values ('i', 0)", "23514", 'instance "i": note_replications is 0, less than the minimum 1', "\\d+ pgharness.instances"),
    ("insert into pgharness.instances (name, grade_replications) values ('i', 1001)", "23514", "grade_replications is 1001, more than the maximum 1000", "pgharness.instances"),
    ("insert into pgharness.instances (name, rubrics_per_case) values ('i', -1)", "23514", "rubrics_per_case is -1", "pgharness.instances"),
    ("insert into pgharness.instances (name, cycle_times) values ('i', '{-1}')", "23514", "cycle_times[0] is -1", "pgharness.instances"),
    ("insert into pgharness.instances (name, cycle_times) values ('i', '{1,null}')", "23514", "cycle_times[1] is null", "pgharness.instances"),
    ("insert into pgharness.instances (name, max_attempts) values ('i', 0)", "23514", "max_attempts is 0", "pgharness.instances"),
    ("insert into pgharness.instances (name, failure_threshold) values ('i', 1.5)", "23514", "failure_threshold is 1.5, more than the maximum 1", "pgharness.instances"),
    ("insert into pgharness.instances (name, budget_usd) values ('i', 0)", "23514", "budget_usd is 0.000000, must be more than 0", "pgharness.instances"),
    ("update pgharness.instances set budget_usd = 'NaN'", "23514", 'budget_usd is "NaN", not a number', "pgharness.instances"),
    ("update pgharness.instances set total_budget_usd = -1", "23514", "total_budget_usd is -1", "pgharness.instances"),
    ("update pgharness.instances set response_cache = 'on'", "23514", 'response_cache is "on"', "pgharness.instances"),
    ("update pgharness.instances set batch_deadline_seconds = -1", "23514", "batch_deadline_seconds is -1", "pgharness.instances"),
    ("insert into pgharness.projects (name, budget_usd) values ('p', 0)", "23514", 'project "p": budget_usd is 0', "pgharness.projects"),
    ("insert into pgharness.instances (name, retry_delay_seconds) values ('i', 'NaN')", "23514", 'retry_delay_seconds is "NaN", not a number', "pgharness.instances"),
    ("insert into pgharness.models (name, provider, model, base_url) values ('m', 'openai', 'x', 'localhost')", "23514", 'model "m": base_url is "localhost"', "pgharness.models"),
    ("insert into pgharness.models (name, provider, model) values ('m', 'openai_compatible', 'x')", "PH002", 'model "m" does not say where it is', "http://localhost"),
    ("insert into pgharness.models (name, provider, model, requests_per_minute) values ('m', 'openai', 'x', 0)", "23514", "requests_per_minute is 0, less than the minimum 1", "pgharness.models"),
    ("update pgharness.models set timeout_seconds = 'NaN' where name = 'simulator'", "23514", 'timeout_seconds is "NaN", not a number', "pgharness.models"),
    ("update pgharness.models set input_usd_per_million = 'NaN' where name = 'simulator'", "23514", 'input_usd_per_million is "NaN", not a number', "pgharness.models"),
    ("insert into pgharness.model_prices (model, valid_from, output_usd_per_million) values ('simulator', '2026-01-01', 'NaN')", "23514", 'price of model "simulator": output_usd_per_million is "NaN"', "pgharness.model_prices"),
    ("insert into pgharness.model_prices (model, valid_from, valid_until, input_usd_per_million) values ('simulator', '2026-02-01', '2026-01-01', 1)", "PH002", "valid_until is 2026-01-01", "Leave valid_until out"),
    # simulated models
    ("insert into pgharness.models (name, provider, parameters) values ('m', 'simulator', '{\"latency_secondz\": 1}')", "PH002", 'model "m": latency_secondz is not a known property', "latency_seconds, "),
    ("insert into pgharness.models (name, provider, parameters) values ('m', 'simulator', '{\"quality\": 7}')", "PH002", 'model "m": quality is 7, more than the maximum 1', "docs/simulator.md"),
    ("insert into pgharness.models (name, provider, parameters) values ('m', 'simulator', '{\"outages\": [{\"seconds\": 1, \"kind\": \"hang\"}]}')", "PH002", "outages[0].start_seconds is missing", "docs/simulator.md"),
    ("insert into pgharness.model_combinations (instance, generator, generator_parameters) values ('bare', 'simulator', '{\"x\": 1}')", "PH002", 'generator_parameters of combination with "simulator": x is not', "docs/simulator.md"),
    ("insert into pgharness.model_combinations (instance, generator, grader, grader_parameters) values ('bare', 'simulator', 'simulator', '{\"noise\": -1}')", "PH002", 'grader_parameters of combination with "simulator": noise is -1', "docs/simulator.md"),
    ("insert into pgharness.models (name, provider, parameters) values ('m', 'simulator', '[]')", "23514", 'model "m": parameters is [], not an object', "pgharness.models"),
    # controlling
    ("select pgharness.resume_run('trial/4', budget_usd => 1e9)", "PH002", 'budget_usd of a run cannot be "1000000000"', "to 999999"),
    ("select pgharness.resume_run('trial/4', failure_threshold => 2)", "PH002", 'failure_threshold of a run cannot be "2"', "from 0 to 1"),
    ("select pgharness.adjust_run('trial/1', max_concurrency => -1)", "PH002", 'max_concurrency of a run cannot be "-1"', "from 1 on"),
    ("select pgharness.cancel_run('trial/9')", "PH001", 'run "trial/9" does not exist', "pgharness.run_progress"),
    ("select pgharness.pause_run(999)", "PH001", 'run "999" does not exist', "pgharness.run_progress"),
    ("select pgharness.rerun(999)", "PH001", "run with id 999 does not exist", "pgharness.runs"),
    ("select pgharness.resume_run(null)", "PH002", "run is missing", "pgharness.run_progress"),
    ("select pgharness.pause_run('trial/2')", "PH003", "is already cancelled", "Only a running run can be paused."),
    ("select pgharness.retry_failed('trial/2')", "PH003", "is cancelled", "select pgharness.resume_run("),
    ("select pgharness.requeue_run('trial/2')", "PH003", "is cancelled", "select pgharness.resume_run("),
    ("select pgharness.cancel_run('trial/3')", "PH003", "is already completed", "Only running or paused runs"),
    ("select pgharness.resume_run('trial/3')", "PH003", "is already completed", "select pgharness.rerun("),
    ("select pgharness.resume_run('trial/4')", "PH006", "has spent 0.5000 USD of its budget of 0.1 USD", "select pgharness.resume_run("),
    ("select pgharness.resume_run('trial/4', budget_usd => 0.2)", "PH006", "of its budget of 0.2 USD", "select pgharness.resume_run("),
    ("select pgharness.heartbeat(999, '{}', 'running', '{}', '{}')", "PH005", "worker 999 is not registered", "Restart the worker."),
    ("select pgharness.charge_crash(999, 'note', 0)", "PH001", 'run "999" does not exist', "pgharness.run_progress"),
]  # fmt: skip

# what the tables' own constraints refuse: the message names the constraint, which names table and column
CONSTRAINED = [
    ("insert into pgharness.instances (name) values ('trial')", "23505", "instances_name_key"),
    ("insert into pgharness.instances (name, cycle_transcript_overlaps) values ('i', '{}')", "23514", "instances_cycle_transcript_overlaps_check"),
    ("insert into pgharness.instances (name, config) values ('i', '{oops')", "22P02", "json"),
    ("insert into pgharness.instances (name, config) values ('i', null)", "PH002 23502", "config"),
    ("insert into pgharness.cases (name, input) values ('c', 'null')", "23514", "cases_input_check"),
    ("insert into pgharness.cases (name, input) values ('c', null)", "23502", "input"),
    ("insert into pgharness.cases (name, input, metadata) values ('c', '1', '[]')", "23514", "cases_metadata_check"),
    ("insert into pgharness.cases (name, input) values ('trial-1', '1')", "23505", "cases_name_key"),
    ("update pgharness.rubrics set validation = 'fine'", "23514", "rubrics_validation_check"),
    ("insert into pgharness.instance_cases (instance, case_name) values ('trial', 'trial-1')", "23505", "instance_cases_pkey"),
    ("insert into pgharness.model_combinations (instance, name, generator) values ('trial', 'combination 0', 'simulator')", "23505", "model_combinations_instance_id_name_key"),
    ("select pgharness.start_run('trial', name => 'trial/1')", "23505", "runs_name_key"),
    ("select pgharness.record_result(999, 'k', '1')", "23503", "results_run_id_fkey"),
    ("select pgharness.record_result((select min(id) from pgharness.runs), '', '1')", "23514", "results_key_check"),
    ("select pgharness.log(null, 'm', 'shout')", "23514", "logs_level_check"),
    ("select pgharness.log(999, 'm')", "23503", "logs_run_id_fkey"),
    ("delete from pgharness.models where name = 'simulator'", "23001 23503", "_fkey"),
    ("delete from pgharness.experiments where name = 'note_grade'", "23001 23503", "instances_experiment_fkey"),
]  # fmt: skip


@pytest.fixture(scope="module")
def filled(shared_url: str) -> Iterator[Database]:
    """A database with an instance of every plight and a run in every state."""
    with psycopg.connect(shared_url, autocommit=True) as db:
        add_instance(db, failure_threshold=1)
        worker = register(db)
        start(db, idempotency_key="k", priority=-1)
        db.execute("select pgharness.cancel_run(%s)", (start(db),))
        start(db, priority=1)
        work_off(db, worker, at_most=10)
        spent = start(db, budget_usd=Decimal("0.1"))
        record(db, worker, note(spent, 0), lost(spent, "note", 1))
        db.execute("insert into pgharness.models (name, provider) values ('member', 'simulator')")
        db.execute(
            """insert into pgharness.models (name, provider, parameters) values ('panel', 'ensemble', '{"members": ["member"]}')"""
        )
        add_instance(db, "empty", cases=0)
        add_instance(db, "bare", combinations=[])
        add_instance(db, "lacking")
        db.execute("delete from pgharness.rubrics where case_name = 'lacking-1' and author = 'bob'")
        add_instance(db, "untargeted", combinations=[("simulator", "exact_match")])
        db.execute(
            "update pgharness.cases set target = null where name like 'untargeted-%'; delete from pgharness.rubrics where case_name like 'untargeted-%'"
        )
        db.execute(
            """insert into pgharness.experiments (name, config_schema)
               values ('limited', '{"type": "object", "additionalProperties": false, "properties": {"depth": {"type": "integer", "maximum": 5}}}')"""
        )
        states = db.execute("select name, status from pgharness.runs order by id").fetchall()
        assert states == [
            ("trial/1", "running"),
            ("trial/2", "cancelled"),
            ("trial/3", "completed"),
            ("trial/4", "paused"),
        ]
        assert orphans(db) == []
        yield db


def rejection(db: Database, statement: str) -> psycopg.Error:
    """Return the error that a statement ends with, having changed nothing."""
    before = contents(db)
    with pytest.raises(psycopg.Error) as caught:
        db.execute(statement.encode())
    assert contents(db) == before
    return caught.value


def test_there_are_at_least_forty_of_them() -> None:
    assert len({statement for statement, *_ in WRONG}) >= 40


@pytest.mark.parametrize(
    ("statement", "sqlstate", "message", "advice"), WRONG, ids=[statement[:100] for statement, *_ in WRONG]
)
def test_wrong_input_is_answered_with_what_is_wrong_and_what_to_type(
    filled: Database, statement: str, sqlstate: str, message: str, advice: str
) -> None:
    error = rejection(filled, statement)
    primary = error.diag.message_primary or ""
    assert error.sqlstate == sqlstate, primary
    assert message in primary
    assert primary[0] == primary[0].lower() and not primary.endswith(".")
    assert error.diag.message_hint, "there is no hint"
    assert advice in f"{error.diag.message_detail} {error.diag.message_hint}"


@pytest.mark.parametrize(
    ("statement", "sqlstate", "names"), CONSTRAINED, ids=[statement[:100] for statement, *_ in CONSTRAINED]
)
def test_a_value_outside_of_its_limits_is_refused_by_a_constraint_with_a_telling_name(
    filled: Database, statement: str, sqlstate: str, names: str
) -> None:
    error = rejection(filled, statement)
    assert error.sqlstate in sqlstate.split(), error
    assert names in (error.diag.message_primary or "")


def test_what_tables_of_inputs_check_is_told_by_name(filled: Database) -> None:
    told_by_triggers = {"provider", "model", "api_key_env", "has_batches", "valid_from", "valid_until"}
    told_by_triggers.add("cycle_transcript_overlaps")
    checked = filled.execute(
        """
        select c.relname, a.attname, pgharness._column_schema(c.relname) -> 'properties' ? a.attname
          from pg_constraint as k join pg_class as c on c.oid = k.conrelid
          join pg_attribute as a on a.attrelid = c.oid and a.attnum = any (k.conkey)
         where k.contype = 'c' and k.conrelid = any ('{pgharness.projects,pgharness.models,pgharness.model_prices,pgharness.instances}'::regclass[])
        """
    ).fetchall()
    assert len(checked) > 25
    assert {column for _, column, is_told in checked if not is_told} <= told_by_triggers
