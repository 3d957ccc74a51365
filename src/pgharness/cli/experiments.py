"""Commands around experiments in code: experiments, instances, run."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from psycopg import Connection
from rich.text import Text

from pgharness import database
from pgharness.cli.configs import ConfigFile, Set, fields, flattened, laid_over, read_config
from pgharness.cli.records import compact, print_run, record_of
from pgharness.cli.runs import EXIT_BY_STATUS, Cache, shortened
from pgharness.cli.session import Json, Session, print_json, session_of, shown, stderr, stdout, table
from pgharness.database import Row
from pgharness.errors import Conflict, HarnessError, InvalidArgument, NotFound

if TYPE_CHECKING:
    from pgharness.sdk.definition import Experiment
    from pgharness.sdk.discovery import Findings, Problem

Name = Annotated[str, typer.Argument(metavar="NAME", help="An experiment's name.")]

_FOLDER = "experiments"
_FEW_VERSIONS = 10


def add_to(app: typer.Typer) -> None:
    app.command()(run)
    group = typer.Typer(no_args_is_help=True, help="Experiments in code: find, describe, begin and register them.")
    group.command("list")(list_experiments)
    group.command("show")(show)
    group.command("new")(new)
    group.command("sync")(sync)
    app.add_typer(group, name="experiments")
    group = typer.Typer(no_args_is_help=True, help="Instances: an experiment with a configuration, under a name.")
    group.command("list")(list_instances)
    group.command("create")(create)
    group.command("clone")(clone)
    app.add_typer(group, name="instances")


# -- experiments


def _found() -> Findings:
    """Return what is in the sources here, without importing any of it; tell what is wrong with some of it."""
    from pgharness.sdk import discovery

    findings = discovery.discover_isolated()
    _print_problems(findings.problems)
    return findings


def _print_problems(problems: Sequence[Problem]) -> None:
    for problem in problems:
        stderr.print(Text(f"{problem}"), soft_wrap=True)


def list_experiments(context: typer.Context, as_json: Json = False) -> None:
    """List the experiments that are registered, and those found here that are not yet.

    Example: pgharness experiments list
    """
    with session_of(context).connection() as connection:
        rows = database.rows(connection, "experiment_list", order="experiment")
    found = {experiment["name"]: experiment for experiment in _found().experiments}
    blank = dict.fromkeys(rows[0]) if rows else {}
    for row in rows:
        here = found.pop(row["experiment"], None)
        row |= {"is_registered": True, "path": here and here["path"]}
    rows += [
        blank
        | {"instance_count": 0, "run_count": 0, "is_served": False, "kind": "code"}
        | {"experiment": name, "is_registered": False, **{key: told[key] for key in _TOLD}}
        for name, told in sorted(found.items())
    ]
    if as_json:
        print_json(rows)
        return
    stdout.print(table(rows, _EXPERIMENTS))
    if found:
        stdout.print(f"{len(found)} not registered yet: pgharness experiments sync")


_TOLD = ("description", "module", "function", "path")
_EXPERIMENTS: dict[str, Any] = {
    "experiment": "experiment",
    "kind": "kind",
    "version": "version",
    "instances": "instance_count",
    "runs": "run_count",
    "served": "is_served",
    "description": lambda row: shortened(row["description"].partition("\n")[0], 40),
}


def _registered(connection: Connection[Any], name: str) -> Row:
    found = database.rows(connection, "experiment_list", experiment=name)
    if found:
        return found[0]
    known = [row["experiment"] for row in database.rows(connection, "experiment_list")]
    close = get_close_matches(name, known, n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else "Register those found here: pgharness experiments sync"
    raise NotFound(f'experiment "{name}" does not exist', hint=hint)


def show(context: typer.Context, name: Name, as_json: Json = False) -> None:
    """Describe an experiment: what its configuration takes, its versions, its instances.

    Example: pgharness experiments show dice
    """
    with session_of(context).connection() as connection:
        row = _registered(connection, name)
        (stored,) = database.rows(connection, "experiments", name=name)
        versions = database.rows(connection, "experiment_versions", experiment_id=stored["id"], order="number")
        instances = database.rows(connection, "instances", experiment=name, order="name")
    versions = [{key: each[key] for key in _VERSION} for each in reversed(versions)]
    taken = fields(stored["config_schema"])
    if as_json:
        limits = {key: stored[key] for key in ("timeout_seconds", "memory_mb", "log_mb")}
        told = {"fields": taken, "config_schema": stored["config_schema"], "versions": versions}
        print_json(row | limits | told | {"instances": [{key: each[key] for key in _INSTANCE} for each in instances]})
        return
    stdout.print(Text(f"{name} ({row['kind']}): {row['description'] or 'no description'}"))
    if row["kind"] == "code":
        stdout.print(Text(f"{row['function']} of {row['module']}, version {row['version']}"), soft_wrap=True)
        allowed = f"{shown(stored['timeout_seconds'])} s, {shown(stored['memory_mb'])} MB of memory"
        stdout.print(f"a run may take {allowed} and log {stored['log_mb']} MB")
    headings = {key: key for key in ("field", "type", "default", "limits", "description")}
    stdout.print(table(taken, headings, title="\nconfiguration") if taken else "it takes no configuration")
    if versions:
        columns: dict[str, Any] = {
            "version": "number",
            "registered": "created_at",
            "commit": _commit,
            "by": "created_by",
        }
        stdout.print(table(versions[:_FEW_VERSIONS], columns, title="\nversions"))
    if instances:
        stdout.print(table(instances, _INSTANCES, title="\ninstances"))
    if row["kind"] == "code":
        stdout.print(Text(f"\nrun it: pgharness run {shlex.quote(name)}"))


_VERSION = ("number", "digest", "module", "function", "git_commit", "is_dirty", "created_by", "created_at")
_INSTANCE = ("id", "name", "experiment", "description", "config", "created_at")
_INSTANCES: dict[str, Any] = {
    "instance": "name",
    "configuration": lambda row: ", ".join(
        f"{key}={compact(value)}" for key, value in flattened(row["config"]).items()
    ),
    "description": lambda row: shortened(row["description"], 60) or None,
}


def _commit(row: Mapping[str, Any]) -> str | None:
    commit: str | None = row["git_commit"]
    return commit and commit[:12] + (" + changes" if row["is_dirty"] else "")


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The experiment's name.")],
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", file_okay=False, help="Where; default the project's folder for them.")
    ] = None,
) -> None:
    """Write the file of a new experiment in code, to be filled in.

    Example: pgharness experiments new triage
    """
    from pgharness.sdk import discovery

    if not (slug := re.sub(r"\W+", "_", name.strip()).strip("_").lower()):
        raise typer.BadParameter(f"{name!r} has no letters.", param_hint="NAME")
    if folder is None:
        marker = discovery.find_marker(Path.cwd())
        sources = [Path(source) for source in discovery.read_marker(marker)[0]] if marker else []
        folder = next((source for source in sources if source.is_dir()), Path(_FOLDER))
    file = folder / f"{slug if slug[0].isalpha() else f'run_{slug}'}.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as opened:
            opened.write(discovery.scaffold(name))
    except FileExistsError as exc:
        raise Conflict(f"{exc.filename} exists already", hint="Choose another NAME or --folder.") from exc
    except OSError as exc:
        raise HarnessError(f"{file} cannot be written: {exc.strerror}", hint="Choose another --folder.") from exc
    places = [Path(source).resolve() for source in discovery.default_sources()]
    is_found = any(file.resolve().is_relative_to(place) for place in places)
    options = "" if is_found else f" --script {shlex.quote(str(file))}"
    stdout.print(Text(f"{file} is written: fill it in"), soft_wrap=True)
    stdout.print(Text(f"Next:  pgharness run {shlex.quote(name.strip())}{options}"), soft_wrap=True)


def sync(context: typer.Context, as_json: Json = False) -> None:
    """Register all experiments found here, and new versions of those known; exit status 1 when some cannot be used.

    Example: pgharness experiments sync
    """
    from pgharness.sdk.discovery import Problem

    findings = _found()
    done = []
    with session_of(context).connection() as connection:
        before = {row["experiment"]: row["version"] for row in database.rows(connection, "experiment_list")}
        for told in findings.experiments:
            place = {key: told.pop(key) for key in ("path", "line", "root")}
            try:
                database.call(connection, "register_experiment", **told)
            except HarnessError as exc:
                findings.problems.append(Problem(place["path"], place["line"], str(exc)))
                _print_problems(findings.problems[-1:])
                continue
            version = _registered(connection, told["name"])["version"]
            known = before.get(told["name"])
            state = "new" if known is None else "unchanged" if known == version else "new version"
            told_where = {"module": told["module"], "function": told["function"], "path": place["path"]}
            done.append({"experiment": told["name"], "state": state, "version": version} | told_where)
    if as_json:
        print_json({"experiments": done, "problems": [asdict(problem) for problem in findings.problems]})
    elif done:
        stdout.print(table(done, {key: key for key in ("experiment", "state", "version", "module")}))
    else:
        stdout.print("No experiments here: pgharness experiments new NAME")
    if findings.problems:
        raise typer.Exit(1)


# -- instances


def list_instances(
    context: typer.Context,
    experiment: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of this experiment.")] = None,
    as_json: Json = False,
) -> None:
    """List instances with their configurations.

    Example: pgharness instances list --experiment dice
    """
    with session_of(context).connection() as connection:
        if experiment is not None:
            _registered(connection, experiment)
        filters: dict[str, Any] = {} if experiment is None else {"experiment": experiment}
        rows = database.rows(connection, "instances", order="name", **filters)
    if as_json:
        print_json([{key: row[key] for key in _INSTANCE} for row in rows])
    elif rows:
        stdout.print(table(rows, {"instance": "name", "experiment": "experiment", **_INSTANCES}))
    else:
        stdout.print("No instances yet: pgharness instances create NAME --experiment EXPERIMENT")


def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The instance's name.")],
    experiment: Annotated[str, typer.Option(metavar="NAME", help="The experiment that it is an instance of.")],
    settings: Set = None,
    config: ConfigFile = None,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    as_json: Json = False,
) -> None:
    """Make an instance: an experiment with a configuration; what you leave out takes the defaults.

    Example: pgharness instances create dice-9 --experiment dice --set rounds=9
    """
    with session_of(context).connection() as connection:
        _registered(connection, experiment)
        given = laid_over(read_config(config) if config else {}, settings or (), _schema(connection, experiment))
        made = {"name": name, "experiment": experiment, "config": given, "description": description}
        row = database.call(connection, "create_instance", **made)[0]
    _print_instance(row, as_json)


def clone(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="FROM", help="The instance to copy, by name or id.")],
    name: Annotated[str, typer.Argument(metavar="TO", help="The copy's name.")],
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Copy an instance under another name, with other values where you give them.

    Example: pgharness instances clone dice-9 dice-99 --set rounds=99
    """
    with session_of(context).connection() as connection:
        given: dict[str, Any] = {}
        if settings and (found := database.rows(connection, "instances", name=source)):
            schema = _schema(connection, found[0]["experiment"])
            given = {"config": laid_over(found[0]["config"], settings, schema)}
        elif settings:
            raise NotFound(f'instance "{source}" does not exist', hint="List them: pgharness instances list")
        row = database.call(connection, "clone_instance", source=source, name=name, **given)[0]
    _print_instance(row, as_json)


def _schema(connection: Connection[Any], experiment: str) -> dict[str, Any]:
    schema = database.rows(connection, "experiments", name=experiment)[0]["config_schema"]
    return schema if isinstance(schema, dict) else {}


def _print_instance(row: Row, as_json: bool) -> None:
    if as_json:
        print_json({key: row[key] for key in _INSTANCE})
        return
    stdout.print(
        Text(f"instance {row['name']} of {row['experiment']}: {_INSTANCES['configuration'](row) or 'no keys'}")
    )
    name, experiment = shlex.quote(row["name"]), shlex.quote(row["experiment"])
    stdout.print(Text(f"Next:  pgharness run {experiment} --instance {name}"), soft_wrap=True)


# -- run


def run(
    context: typer.Context,
    name: Name,
    milestone: Annotated[bool, typer.Option("--milestone", help="Keep the run, with its code.")] = False,
    run_id: Annotated[
        str | None, typer.Option(metavar="ID", help="A milestone's name; default INSTANCE/NUMBER.")
    ] = None,
    module: Annotated[str | None, typer.Option("--module", "-m", metavar="MODULE", help="Where it is.")] = None,
    script: Annotated[
        Path | None, typer.Option("--script", "-s", metavar="FILE", dir_okay=False, help="Where it is.")
    ] = None,
    settings: Set = None,
    instance: Annotated[str | None, typer.Option(help="Its instance; default one named like it.")] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Begin with the defaults, and not with the instance's configuration.")
    ] = False,
    keep_trials: Annotated[bool, typer.Option("--keep-trials", help="Keep earlier trials of the instance.")] = False,
    cache: Cache = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it to workers.")] = False,
    as_json: Json = False,
) -> None:
    """Run an experiment in code here and now; it is registered, and what it tells is recorded.

    A trial takes the place of earlier trials; a milestone stays. Exit status 5 when it failed or was cancelled.

    Example: pgharness run dice --set rounds=9
    """
    if run_id is not None and not milestone:
        raise typer.BadParameter("it names a milestone, which stays: add --milestone.", param_hint="--run-id")
    if module is not None and script is not None:
        raise typer.BadParameter("give a module or a script, not both.", param_hint="--module")
    session, kind = session_of(context), "milestone" if milestone else "trial"
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        experiment = _find(name, module, script)
    place = instance or name
    with session.connection() as connection:
        if not detach:
            database.call(connection, "load_run", run_id=0)  # a role that is not fit for work is told at once
        database.call(connection, "register_experiment", **experiment.registration())
        _configure(connection, experiment, place, settings or (), reset=reset, is_silent=as_json)
        if detach:
            started = {"instance": place, "kind": kind, "name": run_id, "response_cache": cache}
            receipt = database.call(connection, "start_run", **started)[0]
            _print_detached(connection, name, receipt, as_json)
            return
    options = {"instance": place, "kind": kind, "run_name": run_id, "response_cache": cache}
    _run_here(session, experiment, options, keep_trials, as_json)


def _run_here(
    session: Session, experiment: Experiment, options: Mapping[str, Any], keep_trials: bool, as_json: bool
) -> None:
    from pgharness.sdk import direct

    outcome = direct.execute(experiment, url=session.url, settings=session.settings, is_echoed=not as_json, **options)
    with session.connection() as connection:
        is_over = outcome.status in ("completed", "failed", "cancelled")
        if options["kind"] == "trial" and is_over and not keep_trials:
            database.call(connection, "purge_trials", instance=options["instance"], keep=1)
        record = record_of(connection, outcome.run)
    if as_json:
        print_json(record | {"result": outcome.result})
    else:
        print_run(record)
    if code := EXIT_BY_STATUS.get(outcome.status):
        raise typer.Exit(code)


def _find(name: str, module: str | None, script: Path | None) -> Experiment:
    """Return an experiment by its name: of a module or a script, or of what is found here."""
    from pgharness.sdk import discovery

    if module is None and script is None:
        findings = discovery.discover_isolated()
        for told in findings.experiments:
            if told["name"] == name:
                experiment = discovery.load(told["module"], told["function"], Path(told["root"]))
                experiment.qualname = told["function"]
                return experiment
        _print_problems(findings.problems)
        close = get_close_matches(name, [told["name"] for told in findings.experiments], n=3)
        hint = f"Name its file: pgharness run {shlex.quote(name)} --script FILE; or begin it: pgharness experiments new"
        places = [
            "installed packages" if source == discovery.ENTRY_POINTS else source
            for source in discovery.default_sources()
        ]
        raise NotFound(
            f'no experiment "{name}" was found in {", ".join(places)}',
            hint=f"Did you mean {' or '.join(close)}?" if close else hint,
        )
    source = str(script or module)
    catalogue = discovery.discover([source])
    if module is not None and not catalogue.experiments and "." in module:
        source, _, last = module.rpartition(".")  # of a class or a function in it
        inner = discovery.discover([source])
        if any(each.qualname == last for each in inner.experiments.values()):
            catalogue = inner
    if name in catalogue.experiments:
        return catalogue.experiments[name]
    _print_problems(catalogue.problems)
    known = ", ".join(catalogue.experiments)
    raise NotFound(
        f'{source} has no experiment "{name}"',
        hint=f"It has: {known}." if known else f'Write @experiment(name="{name}") above its function or class.',
    )


def _configure(
    connection: Connection[Any],
    experiment: Experiment,
    instance: str,
    settings: Sequence[str],
    *,
    reset: bool,
    is_silent: bool,
) -> None:
    """Make the instance, or give it another configuration, and see that the code takes it."""
    found = database.rows(connection, "instances", name=instance)
    before = found[0]["config"] if found and not reset else {}
    given = laid_over(before, settings, experiment.config_schema()) if settings or reset else None
    try:
        row = database.call(
            connection, "configure_instance", instance=instance, experiment=experiment.name, config=given
        )[0]
        experiment.config(row["config"])
    except InvalidArgument as exc:
        exc.hint = f"See what it takes: pgharness experiments show {shlex.quote(experiment.name)}"
        if before and not _takes(experiment, before):
            exc.hint = f"The code has changed since {instance} was configured: begin with the defaults, by --reset"
        raise
    if found and row["config"] != found[0]["config"] and not is_silent:
        stderr.print(Text(f"instance {instance} has now {_INSTANCES['configuration'](row) or 'no keys'}"))


def _takes(experiment: Experiment, config: Mapping[str, Any]) -> bool:
    try:
        experiment.config(config)
    except InvalidArgument:
        return False
    return True


def _print_detached(connection: Connection[Any], experiment: str, receipt: Row, as_json: bool) -> None:
    receipt = {key: receipt[key] for key in ("run_id", "run", "status", "reason")}
    if as_json:
        print_json(receipt)
        return
    name = shlex.quote(receipt["run"])
    stdout.print(Text(f"run {receipt['run_id']} ({receipt['run']}) is {receipt['status']}"))
    if not _registered(connection, experiment)["is_served"]:
        stdout.print("No running worker has this experiment: pgharness worker")
    stdout.print(Text(f"Watch it: pgharness runs logs {name} -f, or pgharness status {name} --watch"), soft_wrap=True)
