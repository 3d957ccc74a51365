"""Break everything for a while, with work under way, and see whether any of it is lost, stuck or leaked.

make chaos                                      30 minutes
make chaos ARGS='--minutes 2'                   as CI does
make chaos ARGS='--seed 7 --report chaos.json'  the faults of an earlier storm, and all that was seen, as JSON

Three hosts of real worker processes serve runs of many kinds on a durable server of their own. Simulated models answer
with 5% rate limits and 2% errors, and people start, pause, cancel, resume and retry runs. Meanwhile a process, a
supervisor or a whole host is killed every 5 to 20 s, or asked to end; some processes are frozen; the database is
restarted 5 times (3 in a storm of less than 10 minutes), gracefully and by force; and one host, in a network namespace
of its own, loses its network and gets it back. Where namespaces cannot be made (they need Linux, root and iproute2) a
proxy that stops forwarding stands in for the cable, and the report says so. The third host is never killed: it shows
whether memory stays flat.

Then the faults end, and within a bounded time all must be well: every run completed, with exactly the notes and grades
of its plan; nothing failed, waiting, stalled, queued or inconsistent; every worker process at work again, with no more
connections than documented, and no connection left of workers that ended; memory and open files of long-lived processes
flat. Exits 0 when that is so. Else it exits 1, says what is wrong, and keeps a folder with the logs and the database.

The seed decides the faults and when they come; what they hit is decided by the machine as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `world`

import psycopg
from hosts import Host, Server
from judge import facts, has_recorded, not_at_work, verdict, verdict_after_end, wait_for, wait_for_calm, workers_amiss
from load import Conductor, define
from storm import Storm, plan
from watch import Watch

from pgharness import database, schema

LONG_MINUTES = 10
_TICK_SECONDS = 0.1
_SAMPLE_SECONDS = 2.0
_STATUS_SECONDS = 20.0
_CALM_SECONDS = 400.0  # within which all runs must end after the storm


class Chaos:
    """One storm, from the first process to the verdict."""

    def __init__(self, folder: Path, minutes: float, seed: int) -> None:
        self._folder = folder
        self._seconds = minutes * 60
        self._begun = time.monotonic()
        self._seed = seed
        is_long = minutes >= LONG_MINUTES
        stale_seconds = 30.0 if is_long else 6.0  # 30 is the default
        self._patience = 3 * stale_seconds + 45
        self.events: list[str] = []
        self.server = Server(folder)
        logs = folder / "logs"
        logs.mkdir()
        common: dict[str, Any] = {"folder": logs, "url": lambda: self.server.url, "stale_seconds": stale_seconds}
        self.hosts = [
            Host("host-a", processes=2, concurrency=8, **common),
            Host("host-b", processes=1, concurrency=8, network=self.server.network, **common),
            Host("host-c", processes=1, concurrency=8, is_spared=True, **common),
        ]
        self.faults = plan(
            random.Random(f"{seed} faults"),
            self._seconds,
            restarts=5 if is_long else 3,
            cuts=max(1, round(minutes / 8)),
            cut_seconds=(20, 180) if is_long else (12, 18),
        )
        self._away_seconds = stale_seconds * 1.5

    def tell(self, text: str) -> None:
        line = f"{time.monotonic() - self._begun:7.1f} s  {text}"
        self.events.append(line)
        print(line, flush=True)

    def run(self) -> dict[str, Any]:
        """Return the report; key `problems` is empty when all is well."""
        self.server.start()
        with database.connect(self.server.url) as connection:
            schema.upgrade(connection)
            define(connection)
        self.tell(f"the server runs; seed {self._seed}, network by {self.server.network.way}")
        if self.server.why_proxy:
            self.tell(self.server.why_proxy)
        for host in self.hosts:
            host.start()
        self.conductor = Conductor(self.server.url, random.Random(f"{self._seed} load"), self.tell)
        problems = []
        if not wait_for(lambda: not workers_amiss(self.conductor, self.hosts), lambda: None, 60):
            problems += workers_amiss(self.conductor, self.hosts)
        self._watch = Watch(self.hosts)
        self._sample_at = self._status_at = 0.0
        self.storm = Storm(
            self.faults,
            self.hosts,
            self.server,
            self.tell,
            is_at_work=lambda host, seconds: (
                not not_at_work(self.conductor, host)
                and (self.conductor.is_calm or has_recorded(self.conductor, host, seconds))
            ),
            away_seconds=self._away_seconds,
        )
        self.tell("the storm begins")
        while self.storm.seconds < self._seconds:
            self._step()
            time.sleep(_TICK_SECONDS)
        self.storm.end()
        self.conductor.calm_down()
        self.tell("the storm is over: nothing is broken any more, and all runs may end")
        problems += self._judged()
        report = self._report(problems)
        self.conductor.close()
        return report

    def _step(self) -> None:
        self.storm.step()
        self.conductor.step()
        now = time.monotonic()
        if now >= self._sample_at:
            self._sample_at = now + _SAMPLE_SECONDS
            self._watch.sample_processes()
            if self.server.is_up:
                with contextlib.suppress(psycopg.OperationalError):
                    self._watch.sample_server(self.conductor.connection)
        if now >= self._status_at:
            self._status_at = now + _STATUS_SECONDS
            self._tell_status()

    def _tell_status(self) -> None:
        try:
            told = self.conductor.rows(
                "select count(*) as runs, count(*) filter (where status = 'completed') as completed,"
                " coalesce(sum(notes_succeeded + grades_succeeded), 0) as done from pgharness.runs"
            )[0]
        except psycopg.OperationalError:
            return
        self.tell("-- {runs} runs, {completed} completed, {done} notes and grades".format(**told))

    def _judged(self) -> list[str]:
        problems = []
        is_calm = wait_for_calm(self.conductor, self._step, patience=self._patience, limit=_CALM_SECONDS)
        self.calm_seconds = round(self.storm.seconds - self._seconds, 1)
        if is_calm:
            self.tell(f"{self.calm_seconds} s after the storm: all runs have ended")
        else:
            problems.append("the runs do not end")
            self.tell(f"PROBLEM: the runs do not end ({self.calm_seconds} s after the storm)")
        problems += verdict(self.conductor, self.hosts, self._step, patience=self._patience if is_calm else 5)
        self._step()
        lives = self._watch.long_lives(self._seconds)
        if not {"supervisor", "worker"} <= {life.role for life in lives if life.host == "host-c"}:
            problems.append("the processes that nobody killed did not live through the storm")
        problems += [grown for life in lives for grown in life.growth()]
        problems += [
            f"idle in transaction {count} times: {what}" for what, count in self._watch.stuck_transactions.items()
        ]
        problems += self.storm.problems + self.conductor.problems
        self.tell("the workers are asked to end")
        return problems + verdict_after_end(self.conductor, self.hosts, patience=60)

    def _report(self, problems: list[str]) -> dict[str, Any]:
        found = facts(self.conductor)
        counts = [count for _, count in self._watch.connections]
        return {
            "seed": self._seed,
            "minutes": self._seconds / 60,
            "network": self.server.network.way,
            "network_note": self.server.why_proxy,
            "faults": dict(self.storm.counts),
            "controls": dict(self.conductor.controls),
            "calm_seconds": self.calm_seconds,
            **found,
            "items_per_second": round((found["notes"] + found["grades"]) / self.storm.seconds, 1),
            "connections": {"most": max(counts, default=0), "last": counts[-1] if counts else 0},
            "memory": [
                {
                    "host": life.host,
                    "role": life.role,
                    "pid": life.pid,
                    "seconds": round(life.seconds),
                    "mib_by_third": [round(each, 1) for each in life.thirds(1)],
                    "files_by_third": [round(each) if each == each else None for each in life.thirds(2)],
                }
                for life in self._watch.long_lives(self._seconds)
            ],
            "log_lines": logged(self._folder / "logs"),
            "problems": problems,
            "events": self.events,
        }

    def close(self) -> None:
        """End whatever is left."""
        for host in self.hosts:
            host.kill_all()
        self.server.close()


def logged(folder: Path) -> dict[str, int]:
    """Count what the workers logged as an error, by its words without numbers, and their tracebacks."""
    counts: dict[str, int] = {}
    for log in folder.iterdir():
        for line in log.read_text(errors="replace").splitlines():
            is_traceback = line.startswith("Traceback")
            if is_traceback or " ERROR " in line:
                words = line if is_traceback else line.partition(" ERROR ")[2].partition(" ")[2]
                words = "".join("#" if letter.isdigit() else letter for letter in words)[:160]
                counts[words] = counts.get(words, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def summary(report: dict[str, Any]) -> str:
    duplicates = report["duplicates"]
    lines = [
        f"{report['runs']} runs, {report['notes']} notes, {report['grades']} grades, {report['items_per_second']} a second;"
        f" judged {report['calm_seconds']} s after the storm",
        f"faults: {report['faults']}; network by {report['network']}",
        f"controls: {report['controls']}",
        f"calls: {report['outcomes']}",
        f"asked again although answered: {duplicates['items_asked_again']} items, {duplicates['calls_repeated']} calls"
        f" (an item at most {duplicates['most_calls_of_an_item']} times)",
        f"connections of workers: {report['connections']['most']} at most, {report['connections']['last']} in the end",
    ]
    lines += [
        "memory of {role} {pid} on {host}, by thirds of {seconds} s: {mib_by_third} MiB; open files: {files_by_third}".format(
            **life
        )
        for life in report["memory"]
    ]
    if report["log_lines"]:
        lines += ["errors in the workers' logs:", *(f"  {n} x {words}" for words, n in report["log_lines"].items())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long things break (default 30)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="repeats its faults")
    parser.add_argument("--report", type=Path, help="write all that was seen to this file, as JSON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    folder = Path(tempfile.mkdtemp(prefix="pgharness-chaos-"))
    folder.chmod(0o711)  # for root, the server runs as another account
    print(f"seed {options.seed}, {options.minutes:g} minutes, in {folder}", flush=True)
    chaos = Chaos(folder, options.minutes, options.seed)
    try:
        report = chaos.run()
    except (KeyboardInterrupt, SystemExit):
        chaos.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        chaos.close()
    text = json.dumps(report, indent=2, default=str)
    if options.report:
        options.report.write_text(text + "\n")
    print(summary(report))
    if not report["problems"]:
        shutil.rmtree(folder, ignore_errors=True)
        print("all is well")
        return 0
    (folder / "report.json").write_text(text + "\n")
    print(f"\n{len(report['problems'])} problems:")
    print("\n".join(f"- {problem}" for problem in report["problems"]))
    print("".join(f"\nthe end of the latest log of {host.name}:\n{host.tail()}" for host in chaos.hosts))
    print(
        f"Kept in {folder}: report.json, logs/, and the database, which"
        f" `PGHARNESS_HOME={folder / 'server'} pgharness status` reads."
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
