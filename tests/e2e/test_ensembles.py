"""Ensembles by SQL alone: models, an experiment and its results are rows; one worker does the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest

import world
from command_line import CommandLine

DEFINITIONS = """
insert into pgharness.models (name, provider, parameters, input_usd_per_million, output_usd_per_million)
select name, 'simulator', parameters::jsonb, 1, 4
  from (values ('a', '{"latency_seconds": 0.02, "quality": 0.8}'),
               ('b', '{"latency_seconds": 0.02, "quality": 0.7}'),
               ('c', '{"latency_seconds": 0.02, "quality": 0.6}'),
               ('down', '{"latency_seconds": 0, "error_rate": 1}'),
               ('slow', '{"latency_seconds": 60, "latency_spread": 0}')) as m (name, parameters);

insert into pgharness.models (name, provider, parameters) values
  ('majority', 'ensemble', '{"members": ["a", "b", "c"]}'),
  ('samples', 'ensemble', '{"members": ["c", "c", "c", "c", "c"], "strategy": "sequential"}'),
  ('weighted', 'ensemble', '{"members": [{"model": "a", "weight": 0.5}, {"model": "b", "weight": 0.3}, {"model": "down", "weight": 0.2}], "vote": "weighted"}'),
  ('backed up', 'ensemble', '{"members": ["slow", "a"], "strategy": "hedged", "hedge_delay_seconds": 0.05}'),
  ('most down', 'ensemble', '{"members": ["a", "down", "down"]}'),
  ('united', 'ensemble', '{"members": ["a", "b", "c"], "vote": "unanimous"}'),
  ('decided', 'ensemble', '{"members": ["b", "c", "a"], "vote": "unanimous", "below": "escalate"}'),
  ('judges', 'ensemble', '{"members": ["a", "b", "c"], "vote": "mean"}'),
  ('code', 'ensemble', '{"members": ["a"], "vote": "house:vote"}');

insert into pgharness.cases (name, input, target)
select 'question ' || n, to_jsonb(format('Is %s an even number?', n)), to_jsonb(case n % 2 when 0 then 'yes' else 'no' end)
  from generate_series(1, 12) as n;
insert into pgharness.rubrics (case_name, author, validation, criteria)
select name, author, 'accepted', '[{"criterion": "Answers the question", "weight": 10}, {"criterion": "Is polite", "weight": 5}]'
  from pgharness.cases, unnest('{ann,bob}'::text[]) as author;

insert into pgharness.instances (name, experiment, max_attempts, failure_threshold, retry_delay_seconds) values
  ('votes', 'note_grade', 3, 1, 0.1), ('failures', 'note_grade', 1, 1, 0.1), ('panel', 'note_grade', 3, 1, 0.1);
select pgharness.add_cases(name, names => (select array_agg(name) from pgharness.cases))
  from pgharness.instances where name in ('votes', 'failures', 'panel');
insert into pgharness.model_combinations (instance, name, generator, grader)
select 'votes', name, name, 'exact_match' from unnest('{majority,samples,weighted,backed up,decided}'::text[]) as name
union all select 'failures', name, name, 'exact_match' from unnest('{most down,united,code}'::text[]) as name
union all select 'panel', 'judges', 'a', 'judges';

select run_id from pgharness.start_run('votes');
select run_id from pgharness.start_run('failures');
select run_id from pgharness.start_run('panel');
"""


@pytest.fixture(scope="module")
def done(server_url: str, template: str) -> Iterator[world.Database]:
    with world.cloned(server_url, template) as url, psycopg.connect(url, autocommit=True) as db:
        db.execute(DEFINITIONS)
        CommandLine(url).work("--concurrency", "50")
        yield db


def votes(db: world.Database, name: str) -> list[world.Row]:
    """Return the calls of an ensemble in run votes/1, each with the note that it made."""
    found = world.rows(
        db,
        "select c.*, n.output, n.score from pgharness.composite_calls as c"
        " join pgharness.note_results as n on n.run_id = c.run_id and n.note_ordinal = c.ordinal"
        " where n.run = 'votes/1' and c.model = %s and c.outcome = 'succeeded'",
        name,
    )
    assert len(found) == 12
    return found


def members(db: world.Database, call: world.Row) -> list[world.Row]:
    return world.rows(
        db, "select * from pgharness.member_calls where parent_id = %s order by started_at", call["call_id"]
    )


def test_every_run_ends_and_adds_up(done: world.Database) -> None:
    statuses = world.rows(done, "select run, status from pgharness.run_progress order by run")
    assert [tuple(row.values()) for row in statuses] == [
        (f"{run}/1", "completed") for run in ("failures", "panel", "votes")
    ]
    assert world.orphans(done) == []


def test_a_note_is_what_most_members_say(done: world.Database) -> None:
    united = 0
    for call in votes(done, "majority"):
        told = call["composition"]
        most = max(told["votes"].values())
        assert told["votes"][call["output"]] == most
        assert sum(told["votes"].values()) == told["responses"] == 3
        assert call["consensus"] == pytest.approx(most / 3, abs=1e-6)
        assert call["member_count"] == 3
        united += most == 3
    assert 0 < united < 12, "members that always or never agree would show nothing"


def test_calls_of_members_are_rows_whose_costs_add_up_to_the_answer(done: world.Database) -> None:
    for call in votes(done, "majority"):
        rows = members(done, call)
        assert [row["model"] for row in rows] == ["a", "b", "c"]
        assert call["cost_usd"] == sum(row["cost_usd"] for row in rows) > 0
        assert call["latency_ms"] >= max(row["latency_ms"] for row in rows)
        ends = [row["started_at"] + timedelta(milliseconds=row["latency_ms"]) for row in rows]
        assert max(row["started_at"] for row in rows) < min(ends), "they are asked at once"
    own = "select sum(c.cost_usd) as cost, sum(c.input_tokens + c.output_tokens) as tokens from pgharness.calls as c"
    own += " join pgharness.models as m on m.id = c.model_id where m.provider = 'ensemble'"
    assert [float(number) for number in world.rows(done, own)[0].values()] == [0, 0]


def test_samples_of_one_model_differ_and_stop_when_they_agree(done: world.Database) -> None:
    counts = set()
    for call in votes(done, "samples"):
        rows = members(done, call)
        counts.add(len(rows))
        assert len(rows) == 5 or call["consensus"] >= 0.7
        assert all(left["started_at"] < right["started_at"] for left, right in itertools.pairwise(rows))
    assert len(counts) > 1


def test_a_member_that_fails_is_recorded_and_the_others_answer(done: world.Database) -> None:
    for call in votes(done, "weighted"):
        assert call["failed_count"] == 1
        assert [found["outcome"] for found in call["composition"]["failures"]] == ["server_error"]
        assert sorted(call["composition"]["votes"].values()) in ([0.8], [0.3, 0.5])
        assert [(row["model"], row["outcome"]) for row in members(done, call)][2] == ("down", "server_error")


def test_a_slow_member_is_cancelled_and_its_cost_estimated(done: world.Database) -> None:
    for call in votes(done, "backed up"):
        slow, quick = members(done, call)
        assert (slow["outcome"], slow["is_estimated"], quick["outcome"]) == ("cancelled", True, "succeeded")
        assert slow["input_tokens"] > 0
        assert slow["cost_usd"] > 0
        assert call["composition"]["cancelled"] == ["slow"]


def test_the_last_member_decides_where_the_others_do_not_agree(done: world.Database) -> None:
    counts = [len(members(done, call)) for call in votes(done, "decided")]
    assert set(counts) == {2, 3}
    for call in votes(done, "decided"):
        assert call["composition"].get("is_escalated", False) == (call["member_count"] == 3)


def test_what_falls_short_fails_with_its_cause(done: world.Database) -> None:
    causes = {
        (row["combination"], row["cause"]): row
        for row in world.rows(
            done,
            "select combination, cause, count(*) as count, min(error) as error from pgharness.failed_items"
            " where run = 'failures/1' group by 1, 2",
        )
    }
    assert set(causes) == {
        ("most down", "insufficient_responses"),
        ("united", "no_consensus"),
        ("code", "rejected"),
    }
    assert causes["most down", "insufficient_responses"]["count"] == 12
    assert (
        "2 of 3 members have to give a usable answer, and 1 did"
        in causes["most down", "insufficient_responses"]["error"]
    )
    assert "--allow-code" in causes["code", "rejected"]["error"]
    done_united = world.value(
        done, "select count(*) from pgharness.note_results where run = 'failures/1' and combination = 'united'"
    )
    assert causes["united", "no_consensus"]["count"] + done_united == 12


def test_a_panel_of_judges_grades(done: world.Database) -> None:
    grades = world.rows(
        done,
        "select c.* from pgharness.composite_calls as c join pgharness.runs as r on r.id = c.run_id"
        " where r.name = 'panel/1' and c.kind = 'grade'",
    )
    assert len(grades) == 24
    assert all(len(call["composition"]["deviations"]) == 3 for call in grades)
    verdicts = world.rows(done, "select satisfaction, rationale from pgharness.criterion_results where run = 'panel/1'")
    assert len(verdicts) == 48
    assert all(row["rationale"] and 0 <= row["satisfaction"] <= 100 for row in verdicts)
    assert any(row["satisfaction"] % 1 for row in verdicts), "a mean of three is seldom whole"
