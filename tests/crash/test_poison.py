"""Items that kill, hang or block the worker that runs them: they fail by themselves, and the run goes on."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

POISON = """
    import os, time
    from pathlib import Path

    def write(item, **options):
        match item["case"]["name"]:
            case "poison-5":
                os._exit(1)
            case "poison-12":
                time.sleep(3600)
        return f"a note on {item['case']['name']}"

    async def block(item, *, once, **options):
        if item["case"]["name"] == "blocking-1" and not Path(once).exists():
            Path(once).touch()
            time.sleep(3600)
        return "a note"
"""


@pytest.mark.crash
def test_poison_items_fail_and_all_others_are_done(lab: Any) -> None:
    """One kills its worker each time, one hangs for ever; elsewhere one blocks its worker's event loop, once."""
    (lab.folder / "poison.py").write_text(textwrap.dedent(POISON))
    lab.model("writer", "python", model="poison:write", timeout_seconds=1)
    lab.model("blocker", "python", model="poison:block", parameters={"once": str(lab.folder / "once")})
    lab.simulator()
    lab.instance("poison", cases=20, generator="writer", grader="sim", rubrics_per_case=1, max_attempts=2)
    lab.instance("blocking", cases=3, generator="blocker")
    path = f"{lab.environment()['PYTHONPATH']}:{lab.folder}"
    group = lab.workers(2, arguments=["--allow-code"], PYTHONPATH=path, PGHARNESS_STALE_SECONDS="1")
    poisoned, blocking = lab.start("poison"), lab.start("blocking")

    lab.wait_for_end(poisoned, seconds=90)
    failures = (
        "select ordinal, cause, attempts from pgharness.failures where run_id = %s and status = 'failed' order by 1"
    )
    assert lab.rows(failures, poisoned) == [(4, "crashed", 1), (11, "timeout", 2)]
    counts = "select notes_succeeded, notes_failed, grades_succeeded, grades_skipped from pgharness.runs where id = %s"
    assert lab.rows(counts, poisoned) == [(18, 2, 18, 2)]
    lab.wait_for_end(blocking, seconds=60)
    lab.assert_complete(blocking)
    lab.assert_consistent()
    assert "hangs" in group.text()
    # enough to find the item that kills and to be sure of it, and none after that
    died = lab.value("select count(*) from pgharness.workers where status = 'lost'")
    assert 6 <= died <= 16


def test_work_that_was_on_a_worker_when_it_died_is_not_held_against_it(lab: Any) -> None:
    """Whoever kills workers, an innocent item is done in the end, and no crash is left on its record."""
    lab.simulator(latency_seconds=0.3)
    lab.instance(cases=6, generator="sim", max_attempts=1)
    lab.db.execute("insert into pgharness.runs (instance) values ('trial')")
    lab.db.execute("update procrastinate.procrastinate_jobs set args = args || '{\"crashes\": 7}'")
    lab.workers(1)
    lab.wait_for_end(1)
    lab.assert_complete(1)
    assert lab.value("select count(*) from pgharness.failures") == 0
