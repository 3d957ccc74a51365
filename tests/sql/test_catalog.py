"""What every object of schema pgharness owes its readers: a comment, a name by the rules, an index, a pinned path."""

from __future__ import annotations

import re
from typing import Any

import psycopg
import pytest

from pgharness.schema import packaged
from world import Row, rows, value

Database = psycopg.Connection[Any]

# Columns that mean the same wherever they are, and need no comment. Ids of other things (`..._id`) are obvious too.
OBVIOUS = {
    *("id", "name", "description", "created_at", "updated_at", "started_at", "finished_at", "last_at", "last_used_at"),
    *("project", "experiment", "dataset", "instance", "run", "case_name", "combination", "model", "provider", "host"),
    *("generator", "grader", "author", "author_b", "authors", "criterion", "weight", "queue", "config"),
    *("key", "value", "message", "data", "error", "problem", "remedy", "comment", "default_value"),
    *("case_count", "combination_count", "note_count", "grade_count", "author_count", "criteria_count", "author_rank"),
    *("note_replications", "grade_replications", "transcript_overlaps", "seed", "validated_at", "kind", "status"),
    *(
        "notes_succeeded",
        "grades_succeeded",
        "calls_succeeded",
        "calls_rate_limited",
        "mean_score",
        "expected_finish_at",
    ),
    *("input_tokens", "output_tokens", "cost_usd", "note_cost_usd", "grade_cost_usd", "budget_usd", "next_attempt_at"),
    *("latency_p90_ms", "latency_p95_ms", "latency_p99_ms", "mean_absolute_difference", "seconds_since_heartbeat"),
    *("checksum", "applied_at", "heartbeat_at"),
}

# Functions that act with the privileges of the schema's owner, and why the caller's do not suffice.
SECURITY_DEFINERS = {
    "authors insert runs, and may write nothing else of them": (
        "_plan_run _freeze_run _freeze_instance _freeze_rubrics _copy_definition _announce_run _freeze_code _plan_code"
    ),
    "authors may change a run's state only in the ways that these allow": (
        "pause_run resume_run cancel_run retry_failed requeue_run record_result log"
        " adjust_run _lock_run _set_status _settle_run _requeue _drop_jobs _pause_if_spent _retry_tasks purge_trials resume_spent"
    ),
    "authors import runs made elsewhere, whose rows they may not write": (
        "import_run import_run_items finish_imported_run _import_definition"
    ),
    "the queue's tables are for workers and for these": "_defer _defer_range _defer_list _defer_tasks _put_back _kept_grades share_slice next_run take_job join_queue end_slice",
    "who deletes a run deletes what belongs to it, and no milestone": "_delete_items _delete_inputs _delete_contents _protect_milestones",
    "workers record what they did, and may write no table of ours": (
        "load_run load_slice load_inputs record_outcomes charge_crash _missing _missing_grades _record_notes _record_grades"
        " _record_failures _record_calls _advance_run load_code load_tasks add_tasks _known_items map_state map_results record_tasks lose_tasks"
        " fail_run expire_runs record_told _record_rows _is_new keep_artifact start_version load_model"
        " seek_responses _claim_responses release_responses keep_responses _keep_responses _count_hits"
    ),
    "workers take batches further, whose rows they may not write": (
        "next_batch load_batch split_batch begin_submission record_submission forget_submission record_poll finish_batch release_batch"
        " _gather _leave_batches _return_items _close_batch _held_batch _is_held_elsewhere _is_ready _told_batch _load_items"
    ),
    "who starts a run need not see what others spent, nor write it": (
        "_run_budgets _spent_reason _call_cost _refuse_spent _spend _pause_spent_runs _payable_calls"
    ),
    "workers tell how they are, and share limits": (
        "_rate_share _keep_limits register_worker attach_queue_worker heartbeat lose_worker sweep lease_model lease_run take_requests block_model serve_experiments"
    ),
    "workers make the code that they have known, and may define nothing else": "register_experiment",
    "authors may delete what the response cache keeps, and change none of it": "purge_responses",
    "who writes a composite writes who its members are": "_link_members",
    "authors ask for analyses, and store plans of them, and write nothing of what is found": (
        "request_analysis preregister _announce_analysis"
    ),
    "workers sum up what is settled, and may write no table of ours": "settle_scores _settle_scores",
    "workers make analyses, whose rows they may not write": "take_analysis finish_analysis fail_analysis",
    "authors ask for reports, and write nothing of what is in them": "request_report _announce_report",
    "workers make reports, whose rows they may not write": "take_report finish_report fail_report",
}
# Functions without a pinned search path: a pin would keep Postgres from inlining them, and they name no object.
INLINED = {
    "_note_place",
    "_note_ordinal",
    "_grade_place",
    "_score",
    "_share",
    "_target_criteria",
    "_line_checksum",
    "_cost_usd",
    "_token_cost",
    "_student_t",
}
TYPES = {
    *("bigint", "integer", "double precision", "numeric", "boolean", "text", "jsonb", "timestamp with time zone"),
    *("text[]", "integer[]", "bigint[]", "bytea", "uuid", "run_definitions", "run_combinations"),
}


@pytest.fixture
def db(tx: Database) -> Database:
    """Nothing here writes: one database will do."""
    return tx


def reference(db: Database, condition: str) -> list[Row]:
    """Return what the reference says of some objects or parts."""
    return rows(db, f"select * from pgharness.sql_reference where {condition} order by section, name, position")


_FUNCTIONS = """
    select p.proname as name, p.prosecdef as is_definer, obj_description(p.oid, 'pg_proc') as comment,
           (select c from unnest(p.proconfig) as c where c like 'search_path=%') as path
      from pg_proc as p where p.pronamespace = 'pgharness'::regnamespace
"""
_VIEWS = """
    select c.relname as name, c.reloptions as options
      from pg_class as c where c.relnamespace = 'pgharness'::regnamespace and c.relkind = 'v'
"""
_FOREIGN_KEYS = """
    select c.conname as name, c.conrelid as table, c.confdeltype::text as action,
           array(select a.attnum::integer from pg_attribute as a
                  where a.attrelid = c.conrelid and a.attnum = any (c.conkey)
                    and a.atttypid <> 'text'::regtype) as columns
      from pg_constraint as c where c.connamespace = 'pgharness'::regnamespace and c.contype = 'f'
"""
_CONSTRAINTS = """
    select c.conname as name, t.relname as table, c.contype::text as type
      from pg_constraint as c join pg_class as t on t.oid = c.conrelid
     where c.connamespace = 'pgharness'::regnamespace and c.contype <> 'n'
"""
_INDEXES = """
    select i.relname as name, t.relname as table
      from pg_index as x join pg_class as i on i.oid = x.indexrelid join pg_class as t on t.oid = x.indrelid
     where i.relnamespace = 'pgharness'::regnamespace
       and not exists (select from pg_constraint as c where c.conindid = i.oid and c.contype in ('p', 'u'))
"""
_TRIGGERS = """
    select t.tgname as name from pg_trigger as t join pg_class as c on c.oid = t.tgrelid
     where c.relnamespace = 'pgharness'::regnamespace and not t.tgisinternal
"""


# -- comments


def test_every_object_has_a_comment(db: Database) -> None:
    assert [row["name"] for row in reference(db, "part is null") if not row["comment"]] == []
    assert [row["name"] for row in rows(db, _FUNCTIONS) if not row["comment"]] == []
    assert value(db, "select obj_description('pgharness'::regnamespace, 'pg_namespace')")


def test_every_column_that_is_not_obvious_has_a_comment(db: Database) -> None:
    plain = reference(db, "part = 'column' and comment is null")
    unclear = [row for row in plain if row["item"] not in OBVIOUS and not row["item"].endswith("_id")]
    assert [f"{row['name']}.{row['item']}" for row in unclear] == []


def test_no_column_is_called_obvious_for_nothing(db: Database) -> None:
    assert OBVIOUS - {row["item"] for row in reference(db, "part = 'column' and comment is null")} == set()


def test_tables_and_views_say_what_a_row_is(db: Database) -> None:
    found = reference(db, "part is null and section in ('table', 'view')")
    assert len(found) > 45
    assert [row["name"] for row in found if not row["comment"].startswith("One row per ")] == []


def test_functions_give_an_example(db: Database) -> None:
    found = reference(db, "part is null and section = 'function'")
    examples = {row["signature"]: row["comment"].partition(" Example: ")[2] for row in found}
    assert [row["signature"] for row in found if f"pgharness.{row['name']}(" not in examples[row["signature"]]] == []


# -- privileges and paths


def test_views_read_with_the_privileges_of_their_reader(db: Database) -> None:
    found = rows(db, _VIEWS)
    assert [row["name"] for row in found if row["options"] != ["security_invoker=true"]] == []


def test_every_function_pins_its_search_path(db: Database) -> None:
    found = rows(db, _FUNCTIONS)
    paths = {"search_path=pgharness, pg_temp", "search_path=pgharness, procrastinate, pg_temp"}
    assert {row["name"] for row in found if row["path"] not in paths} == INLINED
    assert {row["name"] for row in found if "procrastinate" in (row["path"] or "")} == {"_defer"}


def test_functions_that_act_for_the_owner_are_listed_with_a_reason(db: Database) -> None:
    listed = [name for names in SECURITY_DEFINERS.values() for name in names.split()]
    assert len(listed) == len(set(listed)) and not INLINED & set(listed)
    assert {row["name"] for row in rows(db, _FUNCTIONS) if row["is_definer"]} == set(listed)


# -- names and indexes


def test_every_foreign_key_has_an_index_and_says_what_deleting_does(db: Database) -> None:
    """A key of id and name is found by its id alone."""
    keys = rows(db, _FOREIGN_KEYS)
    assert len(keys) > 25
    indexes = rows(db, "select indrelid as table, indkey::int2[]::int[] as columns from pg_index where indpred is null")
    for key in keys:
        leading = [set(index["columns"][: len(key["columns"])]) for index in indexes if index["table"] == key["table"]]
        assert set(key["columns"]) in leading, f"{key['name']} has no index"
        assert key["action"] != "a", f"{key['name']} leaves what deleting does to the default"


def test_names_of_constraints_and_indexes_tell_their_table(db: Database) -> None:
    suffixes = {"p": "pkey", "u": "key", "f": "fkey", "c": "check"}
    for row in rows(db, _CONSTRAINTS):
        assert re.fullmatch(rf"{row['table']}_(\w+_)?{suffixes[row['type']]}", row["name"]), row["name"]
    for row in rows(db, _INDEXES):
        assert re.fullmatch(rf"{row['table']}_\w+_idx", row["name"]), row["name"]


def test_names_of_triggers_tell_their_order(db: Database) -> None:
    found = rows(db, _TRIGGERS)
    assert len(found) > 10
    assert [row["name"] for row in found if not re.fullmatch(r"_\d{3}_[a-z]+(_[a-z]+)*", row["name"])] == []


def test_names_of_columns_tell_their_type(db: Database) -> None:
    for row in reference(db, "part = 'column'"):
        name, kind = f"{row['name']}.{row['item']}", row["type"].partition("(")[0]
        assert kind in TYPES, f"{name} is of type {row['type']}"
        if row["item"] not in ("blocked_until", "valid_from", "valid_until"):
            assert (kind == "timestamp with time zone") == row["item"].endswith("_at"), name
        assert (kind == "boolean") == bool(re.search(r"(^|_)(is|has|spends)_", row["item"])), name
        assert kind in ("numeric", "double precision") or not row["item"].endswith("_usd"), name


def test_names_are_words_in_lower_case(db: Database) -> None:
    names = {row["name"] for row in reference(db, "part is null")}
    assert {name for name in names if not re.fullmatch(r"[a-z]+(_[a-z]+)*", name)} == set()


def test_every_private_function_is_used(db: Database) -> None:
    text = "\n".join(path.read_text() for path in sorted(packaged("sql").rglob("*.sql")))
    uses = re.sub(r"(create or replace|comment on|drop) function (if exists )?pgharness\.\w+", "", text)
    private = {row["name"] for row in rows(db, _FUNCTIONS) if row["name"].startswith("_")}
    assert len(private) > 30
    assert {name for name in private if not re.search(rf"\b{name}\(", uses)} == set()
