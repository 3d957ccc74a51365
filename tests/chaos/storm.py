"""What breaks, and when: a list that is drawn from the seed before anything starts."""

from __future__ import annotations

import contextlib
import heapq
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import psycopg
from hosts import Host, Server, kill
from load import Tell

_KILLS = {"process": 12, "supervisor": 2, "host": 2, "drain": 2}
_RESTARTS = ("kill", "fast", "immediate", "away", "fast")  # in turn; the one in the middle of a cut comes first
_CUT_BEFORE_RESTART_SECONDS = 4.0
_TROUBLE_SECONDS = 20.0  # after the server or the network came back, in which a start may still fail
_RETURN_SECONDS = 90.0  # within which a host works again after its network was mended
_HOLD_SECONDS = 5.0
_WAITING = (
    "select pid from pg_stat_activity where wait_event_type = 'Lock' and application_name = 'pgharness worker'"
    " and (client_addr is not null or not %s)"
)
_CRASH_EVERY_SECONDS = 300.0
_RESTART_SECONDS = 2.0  # until an init system starts a supervisor again that gave up
_QUEUES = ("note,grade", "grade", "note,grade", "note", "note,grade")  # a host's supervisors, one after the other


class Fault(NamedTuple):
    """Something that happens at a time; what is drawn here says how."""

    at: float
    name: str
    draw: float = 0.0
    seconds: float = 0.0


def plan(
    rng: random.Random, seconds: float, *, restarts: int, cuts: int, cut_seconds: tuple[float, float]
) -> list[Fault]:
    """Draw the faults of a storm: kills every 5 to 20 s, restarts and cuts spread over it, some processes frozen."""
    faults = []
    at = rng.uniform(5, 20)
    while at < seconds:
        faults.append(Fault(at, rng.choices(list(_KILLS), list(_KILLS.values()))[0], rng.random()))
        at += rng.uniform(5, 20)
    at = rng.uniform(30, 90)
    while at < seconds - 10:
        faults.append(Fault(at, "freeze", rng.random(), rng.uniform(3, 40)))
        at += rng.uniform(60, 150)
    at = rng.uniform(0.5, 1.5) * _CRASH_EVERY_SECONDS
    while at < seconds:
        faults.append(Fault(at, "crash", rng.random()))
        at += rng.uniform(0.5, 1.5) * _CRASH_EVERY_SECONDS
    part = seconds / restarts
    restarted = [part * (number + rng.uniform(0.3, 0.7)) for number in range(restarts)]
    for number, at in enumerate(restarted):
        faults.append(Fault(at, _RESTARTS[number % len(_RESTARTS)], seconds=rng.uniform(8, 15)))
    for number in range(cuts):
        length = rng.uniform(*cut_seconds)
        at = seconds * (number + rng.uniform(0.3, 0.6)) / cuts
        if number == 0:
            # the server restarts soon after, and has long given up telling the host about it when the network is back
            at, length = restarted[0] - _CUT_BEFORE_RESTART_SECONDS, cut_seconds[1]
        faults.append(Fault(max(at, 5), "cut", seconds=length))
    return sorted(faults)


class Storm:
    """Carries out the plan, one fault after the other, and puts right what does not mend itself."""

    def __init__(
        self,
        faults: Sequence[Fault],
        hosts: Sequence[Host],
        server: Server,
        tell: Tell,
        *,
        is_at_work: Callable[[Host, float], bool],
        away_seconds: float,
    ) -> None:
        self._faults = list(faults)
        heapq.heapify(self._faults)
        self._hosts = hosts
        self._server = server
        self._tell = tell
        self._is_at_work = is_at_work
        self._away_seconds = away_seconds
        self._begun = time.monotonic()
        self._cut_host = next(host for host in hosts if host.network is not None)
        self._is_cut = False
        self._is_cut_spared = False
        self._mended_at: float | None = None  # until the host is seen at work again, it is left alone
        self._look_at = 0.0
        self._troubled_until = 0.0  # so long a supervisor may give up because it does not reach the server
        self._start_at: dict[str, float | None] = {host.name: None for host in hosts}  # its next supervisor
        self._is_over = False
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def step(self) -> None:
        """Do what is due."""
        while self._faults and self._faults[0].at <= self.seconds:
            fault = heapq.heappop(self._faults)
            getattr(self, f"_{fault.name}")(fault)
        self._look_for_return()
        self._restart_supervisors()

    def end(self) -> None:
        """Put everything right: the network, the server, what is frozen. Supervisors that are gone come back by `step`."""
        self._faults.clear()
        self._is_over = True
        if self._is_cut:
            self._mend(Fault(0, "mend"))
        if not self._server.is_up:
            self._up(Fault(0, "up"))
        for host in self._hosts:
            host.thaw()

    def _push(self, fault: Fault) -> None:
        heapq.heappush(self._faults, fault)

    def _pick(self, draw: float) -> Host:
        spared = self._cut_host if self._is_cut_spared or self._mended_at is not None else None
        hosts = [host for host in self._hosts if not host.is_spared and host is not spared]
        victims = [host for host in hosts for _ in range(host.process_count)]
        return victims[int(draw * len(victims))]

    # -- kills

    def _process(self, fault: Fault) -> None:
        host = self._pick(fault.draw)
        if workers := host.workers:
            pid = workers[int(fault.draw * 7919) % len(workers)]
            kill(pid)
            self._count("worker processes killed", f"kill -9 of worker process {pid} on {host.name}")
        else:
            self._push(Fault(self.seconds + 1, "process", fault.draw))  # it is just being started

    def _supervisor(self, fault: Fault) -> None:
        host = self._pick(fault.draw)
        if host.supervisor is None:
            self._push(Fault(self.seconds + 1, "supervisor", fault.draw))
            return
        self._count("supervisors killed", f"kill -9 of supervisor {host.supervisor} on {host.name}")
        host.kill_supervisor()
        self._start_at[host.name] = self.seconds + 1

    def _host(self, fault: Fault) -> None:
        host = self._pick(fault.draw)
        self._count("hosts killed", f"kill -9 of all {len(host.members)} processes on {host.name}")
        host.kill_all()
        host.frozen.clear()
        self._start_at[host.name] = self.seconds + 3

    def _drain(self, fault: Fault) -> None:
        host = self._pick(fault.draw)
        if host.supervisor is None:
            self._push(Fault(self.seconds + 1, "drain", fault.draw))
            return
        self._count("supervisors drained", f"SIGTERM to supervisor {host.supervisor} on {host.name}")
        host.drain()
        self._start_at[host.name] = self.seconds

    def _freeze(self, fault: Fault) -> None:
        host = self._pick(fault.draw)
        if workers := host.workers:
            pid = workers[int(fault.draw * 7919) % len(workers)]
            host.frozen.add(pid)
            kill(pid, signal.SIGSTOP)
            self._count(
                "worker processes frozen",
                f"worker process {pid} on {host.name} is frozen for {fault.seconds:.0f} s",
            )
            self._push(Fault(self.seconds + fault.seconds, "thaw"))

    def _thaw(self, fault: Fault) -> None:
        for host in self._hosts:
            host.thaw()

    # -- the server

    def _fast(self, fault: Fault) -> None:
        self._down("fast", 0.0)

    def _immediate(self, fault: Fault) -> None:
        self._down("immediate", 0.0)

    def _kill(self, fault: Fault) -> None:
        self._down("kill", 0.0)

    def _away(self, fault: Fault) -> None:
        self._down("fast", self._away_seconds)

    def _down(self, how: str, seconds: float) -> None:
        if not self._server.is_up:
            return
        words = {"fast": "stops fast", "immediate": "stops at once, without a checkpoint", "kill": "is killed with -9"}
        self._count("database restarts", f"the database {words[how]}" + (f", for {seconds:.0f} s" if seconds else ""))
        self._server.stop(how)
        if seconds:
            self._push(Fault(self.seconds + seconds, "up"))
        else:
            self._up(Fault(0, "up"))

    def _up(self, fault: Fault) -> None:
        self._server.start()
        self._troubled_until = self.seconds + _TROUBLE_SECONDS
        self._tell("the database is back")

    def _crash(self, fault: Fault) -> None:
        """Kill one process of the server, which then ends all the others and recovers by itself."""
        if backends := self._server.backends:
            pid = backends[int(fault.draw * len(backends))]
            kill(pid)
            self._troubled_until = self.seconds + _TROUBLE_SECONDS
            self._count("database crashes", f"kill -9 of database process {pid}, so the database recovers")

    # -- the network

    def _cut(self, fault: Fault) -> None:
        with self._statements_in_flight():
            self._server.network.cut()
        self._is_cut = True
        self._is_cut_spared = (
            self.counts["network cuts"] % 2 == 0
        )  # every other time processes are killed there as well
        self._count("network cuts", f"the network to {self._cut_host.name} is cut for {fault.seconds:.0f} s")
        self._push(Fault(self.seconds + fault.seconds, "mend"))

    @contextlib.contextmanager
    def _statements_in_flight(self) -> Iterator[None]:
        """Hold up the host's statements, so that the answer to one of them is lost: the worst moment for a cut."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(psycopg.Error):  # without a server there are none
                connection = stack.enter_context(psycopg.connect(self._server.url, connect_timeout=5))
                connection.execute("set lock_timeout = '5s'")
                connection.execute("select from pgharness.runs where status = 'running' for update")
                deadline = time.monotonic() + _HOLD_SECONDS
                while not connection.execute(_WAITING, (self._server.network.is_addressed,)).fetchone():
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.05)
            yield

    def _mend(self, fault: Fault) -> None:
        self._server.network.mend()
        self._is_cut = self._is_cut_spared = False
        self._mended_at = self.seconds
        self._troubled_until = self.seconds + _TROUBLE_SECONDS
        self._tell("the network is mended")

    def _look_for_return(self) -> None:
        """Notice when the host whose network was cut is at work again; until then nothing is killed there."""
        if self._mended_at is None or not self._server.is_up or self.seconds < self._look_at:
            return
        self._look_at = self.seconds + 1
        took = self.seconds - self._mended_at
        with contextlib.suppress(psycopg.OperationalError):
            if self._is_at_work(self._cut_host, took):
                self._mended_at = None
                self._tell(f"{self._cut_host.name} is at work again, {took:.0f} s after its network was mended")
            elif took > _RETURN_SECONDS:
                self._mended_at = None
                problem = f"{self._cut_host.name} was not at work {took:.0f} s after its network was mended"
                self._tell(f"PROBLEM: {problem}")
                self.problems.append(f"{problem}:\n{self._cut_host.tail()}")

    # -- supervisors

    def _restart_supervisors(self) -> None:
        for host in self._hosts:
            if host.supervisor is not None:
                continue
            at = self._start_at[host.name]
            if at is None:
                self._note_end(host)
                self._start_at[host.name] = self.seconds + _RESTART_SECONDS
            elif at <= self.seconds:
                self._start_at[host.name] = None
                is_plain = self._is_over or host.is_spared
                queues = _QUEUES[0 if is_plain else len(host.logs) % len(_QUEUES)]
                host.start(queues)
                self._tell(f"{host.name} starts its supervisor anew, for {queues}")

    def _note_end(self, host: Host) -> None:
        """A supervisor may give up by itself only when it starts without reaching the server."""
        if self._server.is_up and not self._is_cut and self.seconds > self._troubled_until:
            problem = f"the supervisor on {host.name} ended by itself with status {host.status}"
            self._tell(f"PROBLEM: {problem}")
            self.problems.append(f"{problem}:\n{host.tail()}")

    def _count(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        self._tell(text)
