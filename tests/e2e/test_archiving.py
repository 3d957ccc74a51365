"""Finished runs move into files and come back: exactly, whatever is killed when, and in little memory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection

import world
from command_line import CommandLine
from pgharness import archiving
from pgharness.errors import Conflict, HarnessError, NotFound, WrongState

Database = Connection[Any]
BULK = ("notes", "grades", "calls", "results", "logs")

# What text, JSON, numbers and times can hold: it has to come back bit for bit.
_STRANGE = """
update pgharness.notes set output = case ordinal %% 8
    when 0 then to_jsonb(E'a\\u0001b\\t"quoted" \\\\ back, \\u2028, \\U0001F9EA, \\u0301, line\\nfeed\\r'::text)
    when 1 then '1.00'::jsonb
    when 2 then ('{"huge": 1' || repeat('0', 400) || ', "tiny": 0.' || repeat('0', 300) || '1, "null": null, "": [[], {}], "1.0": 1.0}')::jsonb
    when 3 then 'null'::jsonb
    when 4 then '""'::jsonb
    when 5 then '{"b": 1, "a": {"nested": [1, 2.50, true, "\\u007f"]}, "NaN": "NaN"}'::jsonb
    when 6 then to_jsonb(repeat('\N{GREEK SMALL LETTER LAMDA}', 70000))
    else to_jsonb('</script> %% {} [] '', ;'::text) end,
    created_at = case ordinal %% 4 when 0 then '2026-01-31T23:59:59.999999Z'::timestamptz when 1 then '0044-03-15 BC'
                                  when 2 then 'infinity' else created_at end
 where run_id = %(run)s;
update pgharness.calls set latency_ms = case id %% 6 when 0 then 'NaN'::double precision when 1 then 'Infinity' when 2 then '5e-324'
                                                    when 3 then 0.1::double precision + 0.2::double precision
                                                    when 4 then '-0' else 1.7976931348623157e308 end,
    cost_usd = case id %% 2 when 0 then 999999.99999999 else 0.00000001 end,
    error = case id %% 3 when 0 then '' when 1 then E'\\\\N,"x"\\n' end, answer = case id %% 3 when 2 then E'\\t\\u00e9 \\U0001D11E ' end
 where run_id = %(run)s;
create temporary table strange as select * from pgharness.calls where run_id = %(run)s;
delete from pgharness.calls where run_id = %(run)s;
delete from pgharness.call_totals where run_id = %(run)s;
insert into pgharness.calls overriding system value select * from strange;
update pgharness.grades set score = 'NaN', max_score = 'NaN' where run_id = %(run)s and note_ordinal = 1;
insert into pgharness.results (run_id, key, value) values (%(run)s, E'k\\n', '[1e10, 12345678901234567890.123456789012345678901234567890]');
insert into pgharness.results (run_id, key, value) values (%(run)s, 'nothing', 'null');
insert into pgharness.logs (run_id, level, message, data, created_at) values (%(run)s, 'debug', '', '{"a": null}', '-infinity');
"""


@pytest.fixture
def live(url: str) -> Iterator[Database]:
    """An autocommitting connection to a new database."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def finished(db: Database, name: str = "trial", *, cases: int = 3) -> int:
    """Make a completed run with notes, grades, calls, results and logs; return its id."""
    world.add_instance(db, name, cases=cases, note_replications=4)
    run = world.start(db, name)
    worker = world.register(db, pid=run)
    world.work_off(db, worker)
    db.execute("update pgharness.workers set status = 'stopped' where id = %s", (worker,))
    db.execute("select pgharness.record_result(%s, 'conclusion', '1')", (run,))
    return run


def bulky(db: Database, notes: int, width: int) -> int:
    """Make a cancelled run of many notes with a grade and two calls each; return its id."""
    world.add_instance(db, f"bulk{notes}", cases=10, note_replications=notes // 10, rubrics_per_case=1)
    run = world.start(db, f"bulk{notes}")
    statements = (
        "insert into pgharness.notes select d.run_id, o, p.case_number, p.combination_number, p.overlap, p.replication, 1,"
        " to_jsonb(md5(o::text) || repeat(md5((o * 7)::text), %(width)s / 32)) from pgharness.run_definitions as d"
        " cross join generate_series(0, %(notes)s - 1) as o cross join lateral pgharness._note_place(d, o) as p where d.run_id = %(run)s",
        "insert into pgharness.grades (run_id, note_ordinal, rubric_number, replication, ordinal, attempts, score, max_score)"
        " select run_id, ordinal, 1, 1, ordinal, 1, 1, 2 from pgharness.notes where run_id = %(run)s",
        "insert into pgharness.calls (run_id, kind, ordinal, attempt, model_id, outcome, latency_ms, started_at)"
        " select run_id, k, ordinal, 1, 5, 'succeeded', 1, now() from pgharness.notes, unnest('{note,grade}'::text[]) as k where run_id = %(run)s",
    )
    for statement in statements:
        db.execute(statement.encode(), {"run": run, "notes": notes, "width": width})
    db.execute("select pgharness.cancel_run(%s)", (run,))
    return run


def bulk_of(db: Database, run: int) -> dict[str, Any]:
    """Return every row of a run's bulk tables as text, without the log lines of archiving itself."""
    own = "('archived', 'restored')"
    return {
        table: db.execute(
            f"select t::text from pgharness.{table} as t where run_id = %s{f' and message not in {own}' if table == 'logs' else ''} order by 1".encode(),
            (run,),
        ).fetchall()
        for table in BULK
    }


def is_archived(db: Database, run: int) -> bool:
    return world.run_of(db, run)["archived_at"] is not None


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- there and back


def test_everything_comes_back_bit_for_bit(live: Database, url: str, tmp_path: Path) -> None:
    run = finished(live)
    live.execute(
        "alter table pgharness.grades drop constraint grades_score_check, drop constraint grades_max_score_check"
    )
    for statement in _STRANGE.split(";\n"):
        live.execute(statement.encode(), {"run": run} if "%(" in statement else None)
    before, tables = bulk_of(live, run), world.contents(live)
    assert all(before.values())

    done = archiving.archive_run(live, url, str(run), tmp_path)
    assert is_archived(live, run) and done.is_detached and files(tmp_path) == [done.path.name]
    assert {table: len(found) for table, found in bulk_of(live, run).items()} == dict.fromkeys(BULK, 0)

    live.execute("set timezone = 'Asia/Kathmandu'; set extra_float_digits = 0")
    back = archiving.restore_run(live, done.path)
    assert (back.run_id, back.rows) == (run, done.rows)
    live.execute("reset timezone; reset extra_float_digits")
    assert bulk_of(live, run) == before
    expected = {table for table in tables if table not in ("pgharness.archives", "pgharness.logs")}
    assert {table: digest for table, digest in world.contents(live).items() if table in expected} == {
        table: tables[table] for table in expected
    }
    assert archiving.restore_run(live, done.path) == back  # again: nothing happens
    assert bulk_of(live, run) == before


def test_a_restored_run_goes_on(live: Database, url: str, tmp_path: Path) -> None:
    run = finished(live)
    done = archiving.archive_run(live, url, "trial/1", tmp_path)
    archiving.restore_run(live, done.path)
    assert world.orphans(live) == []
    assert world.value(live, "select (pgharness.retry_failed(%s)).status", run) == "completed"
    again = archiving.archive_run(live, url, "trial/1", tmp_path)
    assert again.path != done.path  # its log has two lines more
    with pytest.raises(Conflict, match="is not the archive"):
        archiving.restore_run(live, done.path)


def test_a_file_explains_itself_to_a_stranger(live: Database, url: str, tmp_path: Path) -> None:
    run = finished(live)
    path = archiving.archive_run(live, url, str(run), tmp_path).path
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        manifest = json.loads(file.read("manifest.json"))
        tables = {
            member["name"]: [json.loads(line) for line in file.read(f"{member['name']}.jsonl").splitlines()]
            for member in manifest["content"]["members"]
        }
        for member in manifest["content"]["members"]:
            assert hashlib.sha256(file.read(f"{member['name']}.jsonl")).hexdigest() == member["sha256"]
            assert len(tables[member["name"]]) == member["rows"]
            about = manifest["about"][member["name"]]
            assert about["about"].startswith("One row per ") and set(about["columns"]) <= {
                column["name"] for column in member["columns"]
            }
    assert (manifest["format"], manifest["content"]["run"], manifest["content"]["run_id"]) == (
        "pgharness archive",
        "trial/1",
        run,
    )
    cases = {row["number"]: row["case_id"] for row in tables["run_cases"]}
    names = {row["id"]: row["name"] for row in tables["cases"]}
    assert {names[cases[note["case_number"]]] for note in tables["notes"]} == {"trial-1", "trial-2", "trial-3"}
    assert {row["rubric_id"] for row in tables["grades"]} <= {row["id"] for row in tables["rubrics"]}
    assert tables["runs"][0]["notes_succeeded"] == len(tables["notes"]) == 12


# -- the commands


def test_commands_archive_list_and_bring_back(live: Database, url: str, tmp_path: Path) -> None:
    run = finished(live)
    line = CommandLine(url)
    assert "No run is archived" in line.call("archive", "--list").out
    kept = line.call("archive", "trial/1", "--out", str(tmp_path / "new" / "folder"), "--keep")
    assert "written, and kept in the database: 12 notes, 24 grades, 36 calls" in kept.out and not is_archived(live, run)
    (done,) = line.call("archive", "trial/1", "--out", str(tmp_path), "--json").json
    assert Path(done["path"]).stat().st_size == done["file_bytes"] and is_archived(live, run)
    assert Path(done["path"]).name in files(tmp_path / "new" / "folder")  # the same rows, the same name
    shown = line.call("archive", "--list").out
    assert "trial/1" in shown and "completed" in shown
    assert line.call("archive", "--list", "--json").json[0]["digest"] == done["digest"]
    refused = line.call("resume", "trial/1", status=1).err
    assert "error:" in refused
    back = line.call("unarchive", done["path"]).out
    assert "run 1 (trial/1) is back: 12 notes, 24 grades, 36 calls" in back and not is_archived(live, run)


def test_runs_are_chosen_by_when_they_finished(live: Database, url: str, tmp_path: Path) -> None:
    for days, name in ((100, "old"), (20, "recent"), (0, "new")):
        run = finished(live, name, cases=1)
        live.execute(
            "update pgharness.runs set finished_at = now() - make_interval(days => %s) where id = %s", (days, run)
        )
    world.add_instance(live, "unfinished")
    world.start(live, "unfinished")
    line = CommandLine(url)
    out = ("--out", str(tmp_path), "--json")
    assert [done["run"] for done in line.call("archive", "--older-than", "90d", *out).json] == ["old/1"]
    assert line.call("archive", "--older-than", "90d", *out).json == []
    day = world.value(live, "select (now() - interval '2 days')::date::text")
    assert [done["run"] for done in line.call("archive", "--finished-before", day, *out).json] == ["recent/1"]
    assert "no run finished before that" in line.call("archive", "--older-than", "500w", *out[:2]).out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("archive", "trial/1"), "--out"),
        (("archive", "--out", "x"), "RUN"),
        (("archive", "trial/1", "--older-than", "90d", "--out", "x"), "RUN"),
        (("archive", "--older-than", "90 days", "--out", "x"), "90 days"),
        (("archive", "--list", "--keep"), "goes alone"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], said: str) -> None:
    assert said in CommandLine("postgresql://nowhere").call(*arguments, status=2).err


# -- refusals


def test_refusals_say_what_to_do(live: Database, url: str, tmp_path: Path) -> None:
    finished(live)
    world.add_instance(live, "going")
    world.start(live, "going")
    line = CommandLine(url)
    out = ("--out", str(tmp_path))
    done = archiving.archive_run(live, url, "trial/1", tmp_path)
    for arguments, said in (
        (("archive", "nobody", *out), ('run "nobody" does not exist', "hint:")),
        (("archive", "going/1", *out), ('run "going/1" is running', "cancel_run")),
        (("archive", "trial/1", *out), ("is archived already", done.path.name, "archived_runs")),
        (("unarchive", str(tmp_path / "missing.zip")), ("missing.zip", "Check the path")),
    ):
        text = line.call(*arguments, status=1).err.replace("\n", "")  # a narrow terminal breaks a long path
        assert all(part in text for part in said), text
    assert files(tmp_path) == [done.path.name]
    with pytest.raises(NotFound):
        archiving.archive_run(live, url, "nobody", tmp_path)
    with pytest.raises(WrongState):
        archiving.archive_run(live, url, "going/1", tmp_path)


def _flip(data: bytes) -> bytes:
    """Return a file with one bit of what its notes are packed to turned over."""
    place = data.index(b"notes.jsonl") + len(b"notes.jsonl") + 40
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def _repacked(path: Path, change: dict[str, bytes | None]) -> bytes:
    """Return a file with some members replaced or left out, every other as it was."""
    copy = path.with_suffix(".copy")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            data = change.get(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    data = copy.read_bytes()
    copy.unlink()
    return data


def test_a_damaged_file_changes_nothing(live: Database, url: str, tmp_path: Path) -> None:
    run = finished(live)
    before = bulk_of(live, run)
    path = archiving.archive_run(live, url, str(run), tmp_path).path
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        notes, manifest = file.read("notes.jsonl"), json.loads(file.read("manifest.json"))
    forged = json.loads(json.dumps(manifest))
    forged["content"]["members"][9]["rows"] += 1
    newer = json.dumps(manifest | {"format_version": 2}).encode()
    for data, said in (
        (_flip(whole), "is damaged"),
        (whole[: len(whole) // 2], "is damaged"),
        (b"", "is damaged"),
        (b"no zip at all", "is damaged"),
        (
            _repacked(path, {"notes.jsonl": notes.replace(b"note 1", b"note 9", 1)}),
            "notes.jsonl is not what was written",
        ),
        (_repacked(path, {"notes.jsonl": notes + b"{}\n"}), "notes.jsonl is not what was written"),
        (_repacked(path, {"calls.jsonl": None}), "is damaged"),
        (_repacked(path, {"manifest.json": None}), "is damaged"),
        (_repacked(path, {"manifest.json": b"[]"}), "is damaged"),
        (_repacked(path, {"manifest.json": json.dumps(forged).encode()}), "its manifest was changed"),
        (_repacked(path, {"manifest.json": newer}), "which is newer"),
    ):
        path.write_bytes(data)
        with pytest.raises(HarnessError, match=said) as caught:
            archiving.restore_run(live, path)
        assert caught.value.hint and is_archived(live, run)
    path.write_bytes(whole)
    archiving.restore_run(live, path)
    assert bulk_of(live, run) == before


def test_the_file_of_another_database_is_refused(
    live: Database, url: str, server_url: str, template: str, tmp_path: Path
) -> None:
    run = finished(live)
    with world.cloned(server_url, template) as other_url, psycopg.connect(other_url, autocommit=True) as other:
        assert finished(other) == run
        file = archiving.archive_run(other, other_url, "trial/1", tmp_path).path
    with pytest.raises(WrongState, match="was never archived here"):
        archiving.restore_run(live, file)
    mine = archiving.archive_run(live, url, "trial/1", tmp_path)
    with pytest.raises(Conflict, match="is not the archive of run") as caught:
        archiving.restore_run(live, file)
    assert mine.path.name in str(caught.value)
    live.execute("delete from pgharness.runs")
    with pytest.raises(NotFound, match="is not in this database"):
        archiving.restore_run(live, mine.path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_loses_nothing(
    live: Database, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = finished(live)
    before = bulk_of(live, run)

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(HarnessError, match="is full" if number == errno.ENOSPC else "cannot be used") as caught:
        archiving.archive_run(live, url, str(run), tmp_path)
    assert "Nothing was lost" in (caught.value.hint or "")
    assert bulk_of(live, run) == before and not is_archived(live, run) and files(tmp_path) == []


def test_a_folder_that_is_none_is_refused(live: Database, url: str, tmp_path: Path) -> None:
    finished(live)
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="cannot be used"):
        archiving.archive_run(live, url, "trial/1", tmp_path / "file")


def test_a_run_that_changes_while_it_is_written_stays(live: Database, url: str, tmp_path: Path) -> None:
    run = finished(live)

    def interfere(_: int) -> None:
        live.execute("select pgharness.record_result(%s, 'conclusion', '2')", (run,))

    with pytest.raises(Conflict, match="results of run"):
        archiving.archive_run(live, url, str(run), tmp_path, on_progress=interfere)
    assert not is_archived(live, run)
    archiving.archive_run(live, url, str(run), tmp_path)
    assert is_archived(live, run)


# -- being killed, and being two

# Archives a run, and kills itself with SIGKILL at a step.
_DOOMED = """
import os, signal, sys
from pathlib import Path
from pgharness import archiving, database

url, run, folder, step = sys.argv[1:]
real = {"detach_run": database.call, "_sync": archiving._sync, "_checked": archiving._checked}

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def call(connection, function, /, **arguments):
    if function == "detach_run":
        if step == "before":
            die()
        found = real[function](connection, function, **arguments)
        if step == "after":
            die()
        return found
    return real["detach_run"](connection, function, **arguments)

database.call = call
if step in ("_sync", "_checked"):
    setattr(archiving, step, die)
with database.connect(url) as connection:
    archiving.archive_run(connection, url, run, Path(folder), on_progress=die if step == "writing" else None)
"""


@pytest.mark.parametrize("step", ["writing", "_checked", "_sync", "before", "after"])
def test_kill_9_at_any_step_loses_nothing(live: Database, url: str, tmp_path: Path, step: str) -> None:
    run = finished(live)
    before = bulk_of(live, run)
    child = subprocess.run([sys.executable, "-c", _DOOMED, url, str(run), str(tmp_path), step], capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    if step == "after":
        assert is_archived(live, run)
    else:
        assert bulk_of(live, run) == before and not is_archived(live, run)
        while world.value(live, "select count(*) from pg_locks where locktype = 'advisory'"):
            pass  # until the server notices that nobody is there
        archiving.archive_run(live, url, str(run), tmp_path)
    (file,) = files(tmp_path)  # what the first try left is gone, or is the file
    assert not any(bulk_of(live, run).values())
    archiving.restore_run(live, tmp_path / file)
    assert bulk_of(live, run) == before


def test_kill_9_of_a_restore_leaves_the_run_archived(live: Database, url: str, tmp_path: Path) -> None:
    run = finished(live)
    before = bulk_of(live, run)
    path = archiving.archive_run(live, url, str(run), tmp_path).path
    code = (
        "import os, signal, sys; from pathlib import Path; from pgharness import archiving, database\n"
        "with database.connect(sys.argv[1]) as connection:\n"
        "    archiving.restore_run(connection, Path(sys.argv[2]), on_progress=lambda _: os.kill(os.getpid(), signal.SIGKILL))"
    )
    child = subprocess.run([sys.executable, "-c", code, url, str(path)], capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert is_archived(live, run) and not any(bulk_of(live, run).values())
    archiving.restore_run(live, path)  # waits until the server has ended what the killed one began
    assert bulk_of(live, run) == before


def test_two_archivers_at_once_archive_a_run_once(live: Database, url: str, tmp_path: Path) -> None:
    run = finished(live)
    before = bulk_of(live, run)
    line = CommandLine(url)
    started = [line.start("archive", str(run), "--out", str(tmp_path)) for _ in range(3)]
    ended = [(process.communicate(timeout=60), process.returncode) for process in started]
    assert 0 in [status for _, status in ended] and is_archived(live, run)
    for (_, err), status in ended:
        assert status == 0 or "by another session" in err or "is archived already" in err, err
    (file,) = files(tmp_path)
    assert world.value(live, "select count(*) from pgharness.logs where message = 'archived'") == 1
    archiving.restore_run(live, tmp_path / file)
    assert bulk_of(live, run) == before


# -- size

_MEASURED = """
import resource, sys
from pathlib import Path
from pgharness import archiving, database
url, run, folder = sys.argv[1:]
with database.connect(url) as connection:
    done = archiving.archive_run(connection, url, run, Path(folder))
    archiving.restore_run(connection, done.path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_run(live: Database, url: str, tmp_path: Path) -> None:
    peaks = []
    for notes in (1_000, 20_000):  # the larger one has 80,000 rows in 50 MB
        run = bulky(live, notes, 1_600)
        output = subprocess.run(
            [sys.executable, "-c", _MEASURED, url, str(run), str(tmp_path)], capture_output=True, check=True
        ).stdout
        peaks.append(int(output) * (1 if sys.platform == "darwin" else 1024))
        assert world.value(live, "select count(*) from pgharness.calls where run_id = %s", run) == 2 * notes
    assert peaks[1] - peaks[0] < 20_000_000
