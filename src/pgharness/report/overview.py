"""The title and the summary: what was asked and what came of it, in words, with the main numbers."""

from __future__ import annotations

from collections.abc import Sequence

from pgharness.analysis import PairComparison
from pgharness.database import Row
from pgharness.report.comparing import Family
from pgharness.report.judging import gravest
from pgharness.report.model import counted, shown, some_of
from pgharness.report.reading import RunData
from pgharness.report.registered import Plan
from pgharness.report.results import estimates


def title(data: Sequence[RunData]) -> tuple[str, str]:
    """Return the report's title and subtitle."""
    names = [run.name for run in data]
    heading = f"Report on run {names[0]}" if len(names) == 1 else f"Comparison of runs {_listed(names)}"
    facts = []
    for run in data:
        progress = run.progress
        until = progress["finished_at"] or progress["started_at"]
        state = f"{progress['kind']} of instance {progress['instance']}, {progress['status']}"
        facts.append(f"{state} {shown(until, 'time')[:10]}" if len(data) == 1 else state)
    return heading, "; ".join(dict.fromkeys(facts))


def _listed(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def summary(data: Sequence[RunData], found: Sequence[Family], planned: Sequence[Plan]) -> tuple[str, ...]:
    """Return the summary's paragraphs: question and design, findings, scores, cost and completeness."""
    compared = _compared(found)
    if compared and planned:
        compared[0] = f"Beyond the plan: {compared[0][0].lower()}{compared[0][1:]}"
    texts = (
        _asked(data),
        *(_tested(plan, data) for plan in planned),
        *compared,
        _scored(data),
        _spent(data),
        gravest(data),
    )
    return tuple(text for text in texts if text)


def _tested(plan: Plan, data: Sequence[RunData]) -> str:
    """Say what came of the hypotheses that were registered, all of them."""
    where = f" for run {plan.run.name}" if len(data) > 1 else ""
    if not plan.rows:
        return f"The plan registered{where} could not be followed: {plan.trouble}"
    told: dict[str, list[str]] = {}
    for row in plan.rows:
        told.setdefault(row["verdict"], []).append(_hypothesis(row))
    count = len(plan.rows)
    noun = "hypothesis" if count == 1 else "hypotheses"
    supported = len(told.get("supported", ()))
    verdicts = "; ".join(f"{verdict}: {some_of(texts, 4)}" for verdict, texts in told.items())
    return (
        f"{supported:,} of {count:,} registered {noun}{where} {'is' if supported == 1 else 'are'} supported at "
        f"{plan.rule}. {verdicts[0].upper()}{verdicts[1:]}."
    )


def _hypothesis(row: Row) -> str:
    if row.get("difference") is None:
        return str(row["hypothesis"])
    ends = ", ".join(shown(row[end], "difference") for end in ("low", "high"))
    return f"{row['hypothesis']} ({shown(row['difference'], 'difference')} [{ends}])"


def _asked(data: Sequence[RunData]) -> str:
    asked = dict.fromkeys(
        text.strip() for run in data if (text := (run.provenance["definition"] or {}).get("description") or "")
    )
    parts = [f"{text.rstrip('.')}." if text[-1] not in "?!" else text for text in asked]
    for run in data:
        if run.is_code:
            parts.append(f"Run {run.name} executed experiment {run.provenance['experiment']}.")
            continue
        made = run.provenance
        parts.append(
            f"Run {run.name} gave {counted(made['case_count'], 'case')} to "
            f"{counted(len(run.combinations), 'combination')} of "
            f"generator and grader, {counted(made['note_replications'] or 1, 'note')} each; "
            f"{counted(run.progress['notes_succeeded'], 'note')} and "
            f"{counted(run.progress['grades_succeeded'], 'grade')} were made."
        )
    return " ".join(parts)


def _scored(data: Sequence[RunData]) -> str:
    """Say the extremes of each run's means: those of different runs may be of different cases."""
    texts = []
    for run in data:
        rows = estimates([run])
        where = f"In run {run.name}, the" if len(data) > 1 else "The"
        if len(rows) == 1:
            texts.append(f"{where} mean score of {rows[0]['combination']} is {_estimated(rows[0])}.")
        elif rows:
            best, worst = (extreme(rows, key=lambda row: row["mean"]) for extreme in (max, min))
            texts.append(
                f"{where} highest mean score is that of {best['combination']}, {_estimated(best)}, the lowest that of "
                f"{worst['combination']}, {_estimated(worst)}; brackets hold confidence intervals over cases."
            )
    return " ".join(texts)


def _estimated(row: dict[str, object]) -> str:
    mean, low, high = row["mean"], row["low"], row["high"]
    assert isinstance(mean, float)
    if not isinstance(low, float) or not isinstance(high, float):
        return f"{shown(mean, 'score')} (one case, so no interval)"
    return f"{shown(mean, 'score')} [{shown(low, 'score')}, {shown(high, 'score')}]"


def _compared(found: Sequence[Family]) -> list[str]:
    """Say what the corrected tests allow to say, and no more."""
    texts = []
    for family in found:
        made = family.comparison
        tested = [pair for pair in made.pairs if pair.differs is not None]
        differing = [pair for pair in tested if pair.differs]
        where = f"{family.title}: " if len(found) > 1 else ""
        if not tested:
            texts.append(f"{where}no pair could be tested.")
            continue
        corrected = f" after {made.correction.capitalize()}'s correction" if len(tested) > 1 else ""
        if not differing:
            pairs = "the one comparison" if len(tested) == 1 else f"none of {counted(len(tested), 'comparison')}"
            verb = "did not show" if len(tested) == 1 else "showed"
            texts.append(
                f"{where}{pairs} {verb} a difference at alpha = {made.alpha:g}{corrected}; that is not evidence "
                "that there is none."
            )
            continue
        told = "; ".join(map(_finding, differing[:4]))
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        texts.append(
            f"{where}{_of_all(len(differing), len(tested))} statistically significant at alpha = "
            f"{made.alpha:g}{corrected}: {told}{more}."
            + (" For the others no difference was shown." if len(differing) < len(tested) else "")
        )
    return [text[0].upper() + text[1:] for text in texts]


def _of_all(found: int, tested: int) -> str:
    if tested == 1:
        return "the one comparison is"
    return f"{'all' if found == tested else f'{found} of'} {tested} comparisons are"


def _finding(pair: PairComparison) -> str:
    """Say what differs, from the one that scores higher."""
    difference = pair.difference or 0.0
    if not difference:
        return f"{pair.first} and {pair.second} differ, though not in their means"
    ends: tuple[float, ...] = (pair.interval.low, pair.interval.high) if pair.interval else ()
    higher, lower = pair.first, pair.second
    if difference < 0:
        higher, lower, difference, ends = lower, higher, -difference, tuple(-end for end in reversed(ends))
    said = f" [{', '.join(shown(end, 'difference') for end in ends)}]" if ends else ""
    return f"{higher} scores higher than {lower} ({shown(difference, 'difference')}{said})"


def _spent(data: Sequence[RunData]) -> str:
    cost = sum(run.costs["cost_usd"] or 0 for run in data)
    names = ("notes_failed", "grades_failed", "tasks_failed")
    failed = sum(run.progress[name] for run in data for name in names)
    calls = sum(run.costs["call_count"] or 0 for run in data)
    lost = f"{counted(failed, 'item')} failed for good" if failed else "nothing failed for good"
    return f"It took {counted(calls, 'call')} and cost {shown(cost, 'usd')} USD; {lost}."


def reproduction(report_runs: Sequence[str]) -> tuple[str, str]:
    """Return the commands that archive the runs and compute the report anew, and what to say of them."""
    names = " ".join(_quoted(name) for name in report_runs)
    lines = (
        f"pgharness archive {names} --keep --out archive",
        "pgharness report --archive archive/*.zip --check report.json",
    )
    return "\n".join(lines), (
        "The first command writes the runs into files, the second computes every number of this report anew from "
        "the files "
        "alone, in a private database that is thrown away, and says whether they agree with report.json (format json)."
    )


def _quoted(name: str) -> str:
    return (
        name if name.isascii() and name.replace("/", "").replace("-", "").replace("_", "").isalnum() else _shell(name)
    )


def _shell(name: str) -> str:
    return "'" + name.replace("'", "'\"'\"'") + "'"
