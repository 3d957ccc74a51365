"""Two hosts' worth of workers on one run: process groups with pools of their own, and a network between machines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pgharness import database, schema
from pgharness.embedded import EmbeddedPostgres, temporary_root

CASES = 100


def part_of(lab: Any, group: Any) -> int:
    """How many calls a group of workers has on record."""
    count: int = lab.value(
        "select count(*) from pgharness.calls as c join pgharness.workers as w on w.id = c.worker_id"
        " where w.pid = any (%s) and c.outcome = 'succeeded'",
        group.children,
    )
    return count


def test_two_hosts_share_a_run_and_one_finishes_it_when_the_other_dies(lab: Any) -> None:
    lab.simulator(latency_seconds=0.2)
    lab.instance(cases=CASES, generator="sim", grader="exact_match", rubrics_per_case=0)
    groups = [lab.workers(1, concurrency=5, waits=False) for _ in range(2)]
    for group in groups:
        lab.wait(lambda group=group: lab.at_work(group), "worker", group=group)
    run_id = lab.start()
    lab.wait(lambda: all(part_of(lab, group) > 10 for group in groups), "both to do a part")
    groups[0].kill()
    lab.wait_for_end(run_id)
    lab.assert_complete(run_id)
    repeated = "select count(*) - count(distinct (kind, ordinal)) from pgharness.calls where outcome = 'succeeded'"
    assert lab.value(repeated) <= 5
    health = dict(lab.rows("select pid, status from pgharness.workers"))
    assert sorted(health.values()) == ["lost", "running"]


# -- with a network between


@dataclass
class Network:
    """Two machines, each with a cable to the one that has the database."""

    machines: list[str]
    cables: list[str]
    addresses: list[str]

    def run_on(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", self.machines[number]]

    def cut(self, number: int) -> None:
        ip("link", "set", self.cables[number], "down")

    def mend(self, number: int) -> None:
        ip("link", "set", self.cables[number], "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and the program ip (package iproute2)")
    mark = uuid.uuid4().hex[:6]
    made = Network([f"pgh-{mark}-{n}" for n in (0, 1)], [f"pgh{mark}{n}" for n in (0, 1)], [])
    try:
        try:
            for number, (machine, cable) in enumerate(zip(made.machines, made.cables, strict=True)):
                subnet = f"10.{213 + number}.{int(mark[:2], 16)}"
                ip("netns", "add", machine)
                ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", machine)
                ip("address", "add", f"{subnet}.1/24", "dev", cable)
                ip("link", "set", cable, "up")
                ip("-n", machine, "address", "add", f"{subnet}.2/24", "dev", "eth0")
                ip("-n", machine, "link", "set", "eth0", "up")
                ip("-n", machine, "link", "set", "lo", "up")
                made.addresses.append(f"{subnet}.1")
        except subprocess.CalledProcessError as exc:
            pytest.skip(f"network namespaces cannot be made here: {exc.stderr.strip()}")
        yield made
    finally:
        for machine, cable in zip(made.machines, made.cables, strict=True):
            subprocess.run(["ip", "link", "delete", cable], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", machine], capture_output=True, check=False)


@pytest.mark.crash
def test_a_host_whose_network_is_cut_is_replaced_and_does_no_harm_when_it_is_back(
    network: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = temporary_root()
    server = EmbeddedPostgres(root, durable=False, settings={"listen_addresses": ", ".join(network.addresses)})
    request.addfinalizer(lambda: shutil.rmtree(root, ignore_errors=True))
    request.addfinalizer(server.close)
    url = server.ensure()
    with (root / "pgdata" / "pg_hba.conf").open("a") as rules:
        rules.writelines(f"host all all {address}/24 trust\n" for address in network.addresses)
    os.kill(server.status().pid or 0, signal.SIGHUP)
    with database.connect(url) as connection:
        schema.upgrade(connection)
    lab = request.getfixturevalue("lab_class")(url, tmp_path)
    request.addfinalizer(lab.close)
    lab.simulator(latency_seconds=0.2)
    lab.instance(cases=CASES, generator="sim")
    groups = [
        lab.workers(
            1,
            concurrency=5,
            prefix=network.run_on(number),
            waits=False,
            PGHARNESS_DATABASE_URL=f"host={address} port=5432 user=pgharness dbname=pgharness",
        )
        for number, address in enumerate(network.addresses)
    ]
    for group in groups:
        lab.wait(lambda group=group: lab.at_work(group), "worker", group=group)
    run_id = lab.start()
    lab.wait(lambda: all(part_of(lab, group) > 5 for group in groups), "both to do a part")
    pid = lab.at_work(groups[0])[0]
    network.cut(0)
    status = "select status from pgharness.workers where pid = %s"
    lab.wait(lambda: lab.value(status, pid) == "lost", "the cut to be noticed", 10)
    lab.wait(lambda: part_of(lab, groups[1]) > CASES // 2, "the other to take over")
    network.mend(0)
    lab.wait_for_end(run_id)
    lab.assert_complete(run_id)
    lab.wait(lambda: lab.value(status, pid) == "running", "the worker to be back", 60)
    again = lab.start()
    lab.wait_for_end(again)
    lab.assert_complete(again)
    repeated = "select count(*) - count(distinct (run_id, kind, ordinal)) from pgharness.calls"
    assert lab.value(repeated) <= 10, "more than was in flight at the cut, and waited for the mend"
    assert "Traceback" not in groups[0].text()
