"""Commands that import: files of cases, rubrics and models, and the clinical experiment runner's tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pgharness import clinical_runner as runner
from pgharness import importing
from pgharness.cli.session import Json, print_json, session_of, stderr, stdout, table
from pgharness.importing import CaseColumns, FileFormat, FileOptions, Imported, OnProgress

File = Annotated[str, typer.Argument(metavar="FILE", help="A .jsonl or .csv file, also gzipped; - is standard input.")]
Format = Annotated[FileFormat | None, typer.Option("--format", help="Where the file's name does not say it.")]
Replace = Annotated[bool, typer.Option("--replace", help="Overwrite rows that exist with other content.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, and keep nothing.")]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True, help="Import files, or an earlier system's tables: all of it, or nothing."
    )
    group.command("cases")(cases)
    group.command("rubrics")(rubrics)
    group.command("models")(models)
    group.command("clinical-runner")(clinical_runner)
    app.add_typer(group, name="import")


@contextmanager
def _progress(what: str) -> Iterator[OnProgress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        yield show


def _print_imported(what: str, done: Imported, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json(
            {"inserted": done.inserted, "updated": done.updated, "unchanged": done.unchanged, "dry_run": dry_run}
        )
        return
    counts = f"{done.inserted:,} inserted, {done.updated:,} updated, {done.unchanged:,} unchanged"
    stdout.print(f"{what}: {counts}" + (" (dry run: nothing was kept)" if dry_run else ""))


def cases(
    context: typer.Context,
    file: File,
    dataset: Annotated[str | None, typer.Option(help="Dataset of all cases; created when new.")] = None,
    name: Annotated[str | None, typer.Option(help="Column with the cases' names; default name.")] = None,
    inputs: Annotated[
        str | None,
        typer.Option("--input", help="Columns that the generator gets, by commas; default input or transcript."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Column with the expected answer; default target.")] = None,
    form: Format = None,
    replace: Replace = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Import cases; columns that are neither name, input nor target become metadata, which no built-in prompt shows.

    Example: pgharness import cases test.jsonl --dataset gsm8k --input question --target answer
    """
    columns = CaseColumns(
        dataset=dataset,
        name=name,
        target=target,
        inputs=tuple(part.strip() for part in (inputs or "").split(",") if part.strip()),
    )
    with session_of(context).connection() as connection, _progress("cases") as on_progress:
        options = FileOptions(file_format=form, replace=replace, dry_run=dry_run, on_progress=on_progress)
        done = importing.import_cases(connection, file, columns, options)
    _print_imported("cases", done, dry_run, as_json)


def rubrics(
    context: typer.Context,
    file: File,
    form: Format = None,
    replace: Replace = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Import rubrics: columns case, author, criteria, and where known validation, validated_at, comments, parent.

    Example: pgharness import rubrics rubrics.jsonl
    """
    with session_of(context).connection() as connection, _progress("rubrics") as on_progress:
        options = FileOptions(file_format=form, replace=replace, dry_run=dry_run, on_progress=on_progress)
        done = importing.import_rubrics(connection, file, options)
    _print_imported("rubrics", done, dry_run, as_json)


def models(
    context: typer.Context,
    file: File,
    form: Format = None,
    replace: Replace = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Import models, by the columns of table models: name, provider, model, prices, limits. Keys are never imported.

    Example: pgharness import models models.csv
    """
    with session_of(context).connection() as connection, _progress("models") as on_progress:
        options = FileOptions(file_format=form, replace=replace, dry_run=dry_run, on_progress=on_progress)
        done = importing.import_models(connection, file, options)
    _print_imported("models", done, dry_run, as_json)


def clinical_runner(
    context: typer.Context,
    schema: Annotated[str, typer.Option(help="Schema that holds the runner's tables.")] = "public",
    source: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="Database that holds them; default this one.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Import everything from the clinical experiment runner's own tables, which are only read; keys stay behind.

    Example: pgharness import clinical-runner --from postgresql://reader@host/evaluations
    """
    session = session_of(context)
    with session.connection() as connection, _progress("rows") as on_progress:
        report = runner.import_clinical_runner(
            connection, source or session.url, schema=schema, dry_run=dry_run, on_progress=on_progress
        )
    counts = [asdict(count) for count in report.counts]
    if as_json:
        print_json({"counts": counts, "remarks": report.remarks, "dry_run": dry_run})
        return
    headings = {name.replace("_", " "): name for name in counts[0]}
    stdout.print(table(counts, headings))
    for remark in report.remarks:
        stdout.print(f"- {remark}", markup=False)
    if dry_run:
        stdout.print("(dry run: nothing was kept)")
