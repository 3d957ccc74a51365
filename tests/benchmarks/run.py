"""Print what pgharness costs and carries, as ratios to baselines measured in the same run: see docs/performance.md.

make bench                                 everything; about 40 minutes
make bench ARGS='--quick'                  one sample each, smaller runs; about four minutes
make bench ARGS='--only items,planning'    some figures; --only hedging is the table of docs/hedging.md
make bench ARGS='--json bench-1.json'      every sample, as well
make bench ARGS='--inspect-python PYTHON'  with Inspect AI, by the Python of an environment that has it
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import analyses
import calibration
import comparison
import figures
import hedging
import storms
import telling
import views
import windows
from bed import Bed
from figures import Line
from rich.console import Console
from rich.table import Table

from pgharness.environment import environment

NAMES = (
    "items",
    "inspect",
    "calls",
    "http",
    "memory",
    "planning",
    "views",
    "start",
    "sharing",
    "telling",
    "hedging",
    "storms",
    "calibration",
    "analyses",
)
INSPECT_PYTHON = "PGHARNESS_BENCH_INSPECT_PYTHON"
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
stderr = Console(stderr=True, highlight=False)


def lines(bed: Bed, wanted: set[str], inspect_python: Path | None) -> Iterator[Line]:
    """Measure the figures wanted, in an order that lets them share what they measured."""
    if "items" in wanted:
        yield from figures.items(bed)
    if "inspect" in wanted and inspect_python is not None:
        yield from comparison.inspect(bed, inspect_python)
    simulated = windows.Windows(bed, are_brief=True)
    if "calls" in wanted:
        yield from windows.calls(bed, simulated)
    if wanted & {"http", "memory"}:
        with bed.stub(windows.CALL_SECONDS) as stub:
            real = windows.Windows(bed, *stub)
            if "http" in wanted:
                yield from windows.http(bed, real)
            if "memory" in wanted:
                yield from windows.memory(bed, simulated, "simulated")
                yield from windows.memory(bed, real, "HTTP")
                yield from windows.growth(bed)
    others: dict[str, Callable[[Bed], Iterator[Line]]] = {
        "planning": figures.planning,
        "views": views.views,
        "start": figures.start,
        "sharing": figures.sharing,
        "telling": telling.telling,
        "hedging": hedging.hedging,
        "storms": storms.storms,
        "calibration": calibration.calibration,
        "analyses": analyses.analyses,
    }
    for name, figure in others.items():
        if name in wanted:
            yield from figure(bed)


def table(measured: list[Line]) -> Table:
    """Return the lines as people read them."""
    result = Table(header_style="bold", show_lines=False)
    result.add_column("figure")
    result.add_column("what", overflow="fold")
    result.add_column("measured", justify="right", no_wrap=True)
    result.add_column("baseline", overflow="fold")
    result.add_column("ratio", justify="right", no_wrap=True)
    result.add_column("goal", no_wrap=True)
    previous = ""
    for line in measured:
        if line.figure != previous:
            result.add_section()
        colour = {True: "green", False: "red", None: "default"}[is_met(line)]
        spread = f"\n[dim]{number(min(line.ratios))} to {number(max(line.ratios))}[/]"
        result.add_row(
            line.figure if line.figure != previous else "",
            line.subject + (f"\n[dim]{line.remark}[/]" if line.remark else ""),
            f"{number(line.value)} {line.unit}",
            f"{number(statistics.median(line.baseline_samples))} {line.unit}: {line.baseline}",
            f"[{colour}]{number(line.ratio)}[/]{spread if line.goals and len(line.ratios) > 1 else ''}",
            "\n".join(
                f"[{'green' if met else 'red'}]{goal} {'met' if met else 'missed'}[/]" for goal, met in line.goals
            ),
        )
        previous = line.figure
    return result


def is_met(line: Line) -> bool | None:
    """Tell whether a line reaches all its goals; None when it has none."""
    return all(met for _, met in line.goals) if line.goals else None


def number(value: float) -> str:
    """Return a number with three significant digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def report(measured: list[Line], facts: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was measured, every sample of it."""
    rows = [asdict(line) | {"ratio": line.ratio, "ratios": line.ratios, "is_met": is_met(line)} for line in measured]
    return {"facts": facts, "environment": environment(), "lines": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one sample each, smaller runs")
    parser.add_argument("--only", metavar="NAME", help=f"figures to measure, by comma, of: {', '.join(NAMES)}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every sample to a file")
    parser.add_argument(
        "--inspect-python",
        metavar="PYTHON",
        type=Path,
        default=os.environ.get(INSPECT_PYTHON),
        help=f"of an environment with Inspect AI, to compare with (else ${INSPECT_PYTHON})",
    )
    options = parser.parse_args()
    wanted = set(options.only.split(",") if options.only else NAMES)
    if unknown := wanted - set(NAMES):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(NAMES)}")
    if options.inspect_python is not None and not os.access(options.inspect_python, os.X_OK):
        parser.error(f"--inspect-python: {options.inspect_python} cannot be run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything started is stopped
    begun = time.monotonic()
    measured: list[Line] = []
    with Bed(is_quick=options.quick) as bed:
        facts = bed.facts() | {"is_quick": options.quick, "repeats": bed.repeats}
        place = "in memory, so commits cost less than on a disk" if facts["is_in_memory"] else "on disk"
        heading = (
            f"Postgres {facts['postgres']}, fsync {facts['fsync']}, data {place} ({facts['data_on']}): a commit takes "
            f"{facts['commit_ms']} ms. {facts['cores']} cores for everything, load average {facts['load_average']} "
            f"before. Median of {bed.repeats}{' (quick: one sample says little)' if options.quick else ''}."
        )
        stdout.print(heading)
        try:
            for line in lines(bed, wanted, options.inspect_python):
                measured.append(line)
                stderr.print(f"{time.monotonic() - begun:4.0f} s  {line.figure}: {line.subject}", markup=False)
        finally:  # what was measured is shown, whatever became of the rest
            stdout.print(table(measured))
            if "inspect" in wanted and options.inspect_python is None:
                stdout.print(comparison.HOW_TO, markup=False)
    facts["seconds"] = round(time.monotonic() - begun, 1)
    if options.json:
        options.json.write_text(json.dumps(report(measured, facts), indent=1, default=str) + "\n")
        stdout.print(f"every sample is in {options.json}", markup=False)


if __name__ == "__main__":
    main()
