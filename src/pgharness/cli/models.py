"""Commands for models: list them, add one, ask one."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.text import Text

from pgharness import database
from pgharness.cli.configs import laid_over, read_config
from pgharness.cli.session import Json, print_json, session_of, stdout, table, usd
from pgharness.database import Row
from pgharness.errors import Conflict, InvalidArgument, ModelError
from pgharness.types import Message, Provider

if TYPE_CHECKING:
    from pgharness.sdk.asking import Question

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter; may be repeated.")]
_SHOWN = ("name", "provider", "model", "parameters", "base_url", "api_key_env", "description")


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Models: anything that answers or scores.")
    group.command("list")(list_models)
    group.command("add")(add)
    app.add_typer(group, name="models")
    app.command()(ask)


def list_models(context: typer.Context, as_json: Json = False) -> None:
    """List models with their parameters.

    Example: pgharness models list
    """
    with session_of(context).connection() as connection:
        rows = database.rows(connection, "models", order="name")
    if as_json:
        print_json([{key: row[key] for key in _SHOWN} for row in rows])
        return
    columns = {key: key for key in ("name", "provider", "model")}
    stdout.print(table(rows, columns | {"parameters": lambda row: json.dumps(row["parameters"], ensure_ascii=False)}))


def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model's name.")],
    provider: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(get_args(Provider))}.")],
    model: Annotated[str, typer.Option(help="The provider's own name of it.")] = "",
    members: Annotated[
        list[str] | None, typer.Option("--member", metavar="MODEL", help="A member of an ensemble or hedge, in order.")
    ] = None,
    settings: Set = None,
    base_url: Annotated[str | None, typer.Option(help="Where its API is, with the version.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="The environment variable that holds its key.")] = None,
    input_usd: Annotated[
        float | None, typer.Option(min=0, max=999_999, metavar="USD", help="Price of a million input tokens.")
    ] = None,
    output_usd: Annotated[
        float | None, typer.Option(min=0, max=999_999, metavar="USD", help="Price of a million output tokens.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Give up on a call after so long.")] = 120,
    replace: Annotated[bool, typer.Option("--replace", help="Change the model of that name.")] = False,
    as_json: Json = False,
) -> None:
    """Add a model; the same one again changes nothing.

    Example: pgharness models add panel --provider ensemble --member a --member b --member c --set vote=majority
    """
    parameters = laid_over({"members": members} if members else {}, settings or (), {})
    row: dict[str, Any] = {"line": 1, "name": name, "provider": provider, "model": model, "parameters": parameters}
    row |= {"base_url": base_url, "api_key_env": api_key_env, "timeout_seconds": timeout}
    row |= {"input_usd_per_million": input_usd, "output_usd_per_million": output_usd}
    given = {key: value for key, value in row.items() if value is not None}
    with session_of(context).connection() as connection:
        done = database.call(connection, "import_models", rows=json.dumps([given]), replace=replace)[0]
        if done["problems"]:
            message, _, hint = done["problems"][0]["problem"].partition("; ")
            kind = Conflict if "exists with other values" in message else InvalidArgument
            raise kind(message.removeprefix("name: "), hint=hint or None)
        added = database.rows(connection, "models", name=name)[0]
    if as_json:
        print_json({key: added[key] for key in _SHOWN})
        return
    outcome = "added" if done["inserted"] else "changed" if done["updated"] else "is there already"
    stdout.print(Text(f"model {name} {outcome}"))
    stdout.print(Text(f'Next:  pgharness ask {name} "Say hello."'))


def ask(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    schema: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON Schema that the answer must fit.")] = None,
    settings: Set = None,
    seed: Annotated[int, typer.Option(help="Another seed, another answer, where the model takes one.")] = 0,
    as_json: Json = False,
) -> None:
    """Ask a model one question, and show what each call cost; nothing is recorded.

    Example: pgharness ask panel "Is 91 a prime number? Answer yes or no."
    """
    from pgharness.sdk.asking import Question  # it takes a while to import

    session = session_of(context)
    messages = [*([Message("system", system)] if system else []), Message("user", prompt)]
    parameters = laid_over({}, settings or (), {})
    question = Question(messages, read_config(str(schema)) if schema else None, parameters, seed)
    with session.connection() as connection:
        names = {row["id"]: row["name"] for row in database.rows(connection, "models")}
    try:
        answer = asyncio.run(question.ask(session.url, session.settings, model))
    except ModelError as exc:
        if question.calls and not as_json:
            _print_calls(question, names)
        raise exc from None
    if as_json:
        calls = [{**call, "model": names[call["model_id"]]} for call in question.calls]
        told = ("text", "data", "confidence", "composition", "model", "finish_reason")
        print_json({key: getattr(answer, key) for key in told} | {"calls": calls})
        return
    stdout.print(Text(answer.text), soft_wrap=True)
    _print_calls(question, names)
    if answer.composition is not None:
        stdout.print(Text(json.dumps(answer.composition, ensure_ascii=False)), soft_wrap=True)


def _print_calls(question: Question, names: dict[int, str]) -> None:
    """Show calls below those that they were made for, and what they cost together."""
    rows = list(_below(_by_parent(question.calls), None, 0))
    columns: dict[str, Any] = {
        "model": lambda row: "  " * row["depth"] + names[row["model_id"]],
        "outcome": "outcome",
        "ms": lambda row: round(row["latency_ms"]),
        "tokens": lambda row: row.get("input_tokens", 0) + row.get("output_tokens", 0),
        "USD": lambda row: usd(row.get("cost_usd", 0)),
    }
    stdout.print(table(rows, columns))
    if len(rows) > 1:
        stdout.print(Text(f"total: {usd(sum(row.get('cost_usd', 0) for row in rows))} USD"))


def _by_parent(calls: Sequence[Row]) -> dict[Any, list[Row]]:
    found = defaultdict[Any, list[Row]](list)
    starts = {call["started_at"] for call in calls}
    for call in sorted(calls, key=lambda call: call["started_at"]):
        parent = call.get("parent_started_at")
        found[parent if parent in starts else None].append(call)
    return found


def _below(calls: dict[Any, list[Row]], parent: Any, depth: int) -> Iterator[Row]:
    for call in calls.pop(parent, ()):
        yield {**call, "depth": depth}
        yield from _below(calls, call["started_at"], depth + 1)
