"""The substrate shift experiment on simulated models: who noticed, as the harness says and as one counts by hand."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from pgharness.errors import InvalidArgument
from pgharness.sdk import direct, discovery
from pgharness.settings import Settings

FOLDER = Path(__file__).parents[2] / "experiments" / "substrate_shift"
MODELS = (FOLDER / "models.sql").read_bytes()
# a simulated model ends every fourth answer or so with this line
MARKER = "Plan: Supportive care discussed; return if symptoms persist."
CONFIG = {
    "model_pairs": [
        {"first": "substrate/a", "second": "substrate/b"},
        {"first": "substrate/b", "second": "substrate/a"},
    ],
    "runs_per_pair": 6,
    "parallelism": 4,
    "switch_turns": [0, 3, 5],
    "turns": 5,
    "marker": MARKER,
}
Z = NormalDist()


def run(url: str, config: dict[str, Any]) -> direct.Outcome:
    catalogue = discovery.discover([str(FOLDER)])
    assert not catalogue.problems
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(MODELS)
    experiment = catalogue.experiments["substrate_shift"]
    return direct.execute(experiment, url=url, settings=Settings.from_env(), config=config, is_echoed=False)


def rows(url: str, query: str) -> list[dict[str, Any]]:
    with psycopg.connect(url, row_factory=dict_row) as connection:
        return connection.execute(query.encode()).fetchall()


@pytest.fixture
def outcome(url: str) -> direct.Outcome:
    """A run of two pairs on the simulator."""
    return run(url, CONFIG)


def conversations(url: str) -> list[dict[str, Any]]:
    return [row["value"] for row in rows(url, "select value from pgharness.run_results where value ? 'turns'")]


def marked_by_hand(conversation: dict[str, Any]) -> list[int]:
    return [said["turn"] for said in conversation["turns"] if said["response"].split("\n")[-1] == MARKER]


def wilson(hits: int, count: int) -> tuple[float, float]:
    z, share = Z.inv_cdf(0.975), hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    width = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - width, centre + width


def test_it_holds_each_conversation_once_and_keeps_every_turn(url: str, outcome: direct.Outcome) -> None:
    assert (outcome.status, outcome.result) == ("completed", {"conversations": 36, "failed": 0})
    held = conversations(url)
    planned = sorted(
        (pair["first"], turn, run) for pair in CONFIG["model_pairs"] for turn in (0, 3, 5) for run in range(1, 7)
    )
    assert sorted((each["pair"]["first"], each["switch_turn"], each["replication"]) for each in held) == planned
    for each in held:
        pair, switch = each["pair"], each["switch_turn"]
        assert [said["turn"] for said in each["turns"]] == [1, 2, 3, 4, 5]
        assert [said["model"] for said in each["turns"]] == [
            pair["second"] if switch and turn >= switch else pair["first"] for turn in range(1, 6)
        ]
        assert len({said["question"] for said in each["turns"]}) == 5
        assert each["marked_turns"] == marked_by_hand(each)
        sizes = [said["usage"]["input_tokens"] for said in each["turns"]]
        assert sizes == sorted(set(sizes)), "every turn is asked with the whole history"
    calls = rows(url, "select count(*) as n from pgharness.calls where outcome = 'succeeded'")
    assert calls[0]["n"] == 36 * 5


def test_its_figures_are_those_of_a_count_by_hand(url: str, outcome: direct.Outcome) -> None:
    (analysis,) = [row["value"] for row in rows(url, "select value from pgharness.run_results where key = 'analysis'")]
    metrics = rows(url, "select name, value, data from pgharness.run_metrics where run_id = 1")
    assert analysis["failed"] == 0
    for pair, figures in zip(CONFIG["model_pairs"], analysis["pairs"], strict=True):
        assert figures["pair"] == f"{pair['first']} -> {pair['second']}"
        own = [each for each in conversations(url) if each["pair"] == pair]
        switched = [each for each in own if each["switch_turn"]]
        controls = [each for each in own if not each["switch_turn"]]
        waits = [
            next((turn - each["switch_turn"] for turn in marked_by_hand(each) if turn >= each["switch_turn"]), None)
            for each in switched
        ]
        hits = [wait for wait in waits if wait is not None]
        premature = sum(any(turn < each["switch_turn"] for turn in marked_by_hand(each)) for each in switched)
        alarms = sum(bool(marked_by_hand(each)) for each in controls)
        assert 0 < len(hits) < 12 or 0 < alarms < 6, "this seed shows nothing: choose other numbers"

        for name, count, of in (
            ("detection_rate", len(hits), 12),
            ("premature_rate", premature, 12),
            ("false_alarm_rate", alarms, 6),
        ):
            low, high = wilson(count, of)
            assert figures[name] == {
                "value": pytest.approx(count / of),
                "low": pytest.approx(low, abs=1e-6),
                "high": pytest.approx(high, abs=1e-6),
                "count": of,
            }
        # as many windows from turn 3 on as from turn 5 on
        windows = [max(marked_by_hand(each), default=0) >= start for each in controls for start in (3, 5)]
        hit_rate, alarm_rate = (len(hits) + 0.5) / 13, (sum(windows) / 2 + 0.5) / 7
        d_prime = figures["d_prime"]
        assert d_prime["value"] == pytest.approx(Z.inv_cdf(hit_rate) - Z.inv_cdf(alarm_rate))
        low, high = bootstrapped_d_prime(hit_rate, alarm_rate)
        assert (d_prime["low"], d_prime["high"]) == (pytest.approx(low, abs=0.35), pytest.approx(high, abs=0.35))
        latency = figures["mean_latency_turns"]
        assert sorted(figures["latencies"]) == sorted(hits)
        assert (latency["value"], latency["count"]) == (pytest.approx(statistics.fmean(hits)), len(hits))
        if len(set(hits)) > 1:
            low, high = bootstrapped_mean(hits)
            assert (latency["low"], latency["high"]) == (pytest.approx(low, abs=0.2), pytest.approx(high, abs=0.2))
        for name in ("detection_rate", "false_alarm_rate", "d_prime", "mean_latency_turns"):
            told = [row for row in metrics if row["name"] == name and row["data"]["pair"] == figures["pair"]]
            assert [row["value"] for row in told] == [pytest.approx(figures[name]["value"])]
            assert told[0]["data"]["low"] == figures[name]["low"]


def bootstrapped_d_prime(hit_rate: float, alarm_rate: float) -> tuple[float, float]:
    rng = random.Random(1)
    drawn = []
    for _ in range(4_000):
        hits = sum(rng.random() < hit_rate for _ in range(12))
        alarms = sum(rng.random() < alarm_rate for _ in range(6))
        drawn.append(Z.inv_cdf((hits + 0.5) / 13) - Z.inv_cdf((alarms + 0.5) / 7))
    cuts = statistics.quantiles(drawn, n=40)
    return cuts[0], cuts[-1]


def bootstrapped_mean(values: list[int]) -> tuple[float, float]:
    rng = random.Random(2)
    drawn = [statistics.fmean(rng.choices(values, k=len(values))) for _ in range(4_000)]
    cuts = statistics.quantiles(drawn, n=40)
    return cuts[0], cuts[-1]


def test_no_more_conversations_are_held_at_a_time_than_the_configuration_says(
    url: str, outcome: direct.Outcome
) -> None:
    spans = rows(url, "select started_at, finished_at from pgharness.task_results where ordinal > 0")
    most = max(sum(one["started_at"] <= at["started_at"] < one["finished_at"] for one in spans) for at in spans)
    assert 1 <= most <= CONFIG["parallelism"]


def test_the_same_seed_gives_the_same_answers_and_figures(url: str, outcome: direct.Outcome) -> None:
    run(url, CONFIG)
    analyses = rows(url, "select run_id, value::text from pgharness.run_results where key = 'analysis' order by 1")
    assert [row["run_id"] for row in analyses] == [1, 2]
    assert analyses[0]["value"] == analyses[1]["value"]


def test_a_failed_turn_fails_its_conversation_and_is_recorded(url: str) -> None:
    config = CONFIG | {
        "model_pairs": [{"first": "substrate/a", "second": "substrate/refuses"}],
        "runs_per_pair": 2,
        "switch_turns": [0, 4],
    }
    outcome = run(url, config)
    assert (outcome.status, outcome.result) == ("completed", {"conversations": 2, "failed": 2})
    failed = [each for each in conversations(url) if each["error"]]
    assert [(each["switch_turn"], each["failed_turn"], len(each["turns"])) for each in failed] == [(4, 4, 3)] * 2
    tasks = rows(url, "select error from pgharness.task_results where status = 'failed'")
    assert all(re.search(r"turn 4, by substrate/refuses: .*refused", row["error"]) for row in tasks) and len(tasks) == 2
    (analysis,) = [row["value"] for row in rows(url, "select value from pgharness.run_results where key = 'analysis'")]
    assert analysis["failed"] == 2
    assert analysis["pairs"][0]["detection_rate"]["count"] == 0
    assert analysis["pairs"][0]["d_prime"]["value"] is None


@pytest.mark.parametrize(
    "wrong", [{"switch_turns": [0, 1]}, {"switch_turns": [0, 6]}, {"switch_turns": [3, 3]}, {"turns": 11}]
)
def test_switches_are_turns_of_the_conversation(url: str, wrong: dict[str, Any]) -> None:
    experiment = discovery.discover([str(FOLDER)]).experiments["substrate_shift"]
    with pytest.raises(InvalidArgument):
        experiment.config(CONFIG | wrong)


def test_a_model_that_notices_is_told_from_one_that_does_not(url: str) -> None:
    discovery.discover([str(FOLDER)])  # whose imports can then be found
    import analysis

    def figures(marked: dict[int, list[tuple[int, ...]]]) -> Any:
        held = [analysis.Conversation("p", switch, turns) for switch, each in marked.items() for turns in each]
        return analysis.analyse("p", held, seed=3)

    sharp = figures({0: [()] * 20, 5: [(5,)] * 18 + [(7,), ()]})
    assert sharp.d_prime.low > 1.5 and sharp.detection_rate.value == 0.95
    assert sharp.latencies == [0] * 18 + [2]
    talker = figures({0: [tuple(range(1, 11))] * 20, 5: [tuple(range(1, 11))] * 20})
    assert talker.d_prime.value == pytest.approx(0) and talker.premature_rate.value == 1
    assert talker.d_prime.low < 0 < talker.d_prime.high, "certainty is not read off twenty that agree"
    # a late switch leaves one turn: only controls that write the marker there count against it
    early = figures({0: [(2,)] * 10, 10: [(10,)] * 10})
    assert early.false_alarm_rate.value == 1 and early.by_switch_turn[0].false_alarm_rate.value == 0
    assert early.d_prime.low > 1


def test_its_marker_is_found_however_it_is_set_off() -> None:
    discovery.discover([str(FOLDER)])
    import analysis

    for text in (
        "[MODEL CHANGED]\nHello",
        "**[Model changed]**\n\nHello",
        "> `[MODEL CHANGED]`",
        "Hello\n[MODEL CHANGED]",
    ):
        assert analysis.has_marker(text, "[MODEL CHANGED]"), text
    assert not analysis.has_marker("I would write [MODEL CHANGED] if I noticed.", "[MODEL CHANGED]")


def test_readme_commands_give_an_analysis(url: str) -> None:
    """The folder's README is run as it stands."""
    (block,) = re.findall(r"^```sh\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines():
        command = [sys.executable, "-m", *shlex.split(line, comments=True)]
        environment = os.environ | {"PGHARNESS_DATABASE_URL": url}
        done = subprocess.run(
            command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    found = rows(url, "select value from pgharness.run_results where key = 'analysis'")
    assert json.dumps(found[0]["value"]).count("d_prime") == 1
