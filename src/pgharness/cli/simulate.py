"""`pgharness simulate`: simulated models behind an OpenAI-compatible API, for load tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pgharness.cli.configs import laid_over
from pgharness.cli.session import stdout

if TYPE_CHECKING:
    from pgharness.simulation import SimulationServer


def add_to(app: typer.Typer) -> None:
    app.command()(simulate)


def simulate(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this host's.")] = "127.0.0.1",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of provider simulator. Repeatable."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="A model to serve. Repeatable.")
    ] = None,
    requests_per_second_limit: Annotated[
        float | None, typer.Option(metavar="N", help="Answer 429 above so many requests a second.")
    ] = None,
    concurrency_limit: Annotated[
        int | None, typer.Option(metavar="N", help="Answer 429 above so many requests at once.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other answers, faults and latencies.")] = 0,
) -> None:
    """Serve simulated models over HTTP, as an OpenAI-compatible API, until Ctrl-C; counts are at /stats.

    Example: pgharness simulate --port 8000 --set latency_seconds=0.2 --concurrency-limit 50
    """
    import uvloop  # these take half a second

    from pgharness import simulation
    from pgharness.gateway.simulated_world import SimulatorParameters

    if not all(name.strip() for name in model or ()):
        raise typer.BadParameter("a model needs a name.", param_hint="--model")
    parameters = laid_over({}, settings or [], SimulatorParameters.model_json_schema())
    if requests_per_second_limit is not None:
        parameters["requests_per_second_limit"] = requests_per_second_limit
    if concurrency_limit is not None:
        parameters["concurrency_limit"] = concurrency_limit
    server = simulation.SimulationServer(parameters, models=model or ["simulator"], seed=seed)
    uvloop.run(simulation.serve(server, host=host, port=port, on_ready=_print_ready))
    done = server.stats
    stdout.print(
        f"{done.requests} requests: {done.completed} completed, {done.refused} refused, {done.failed} failed, "
        f"{done.rejected} rejected, {done.cancelled} cancelled; {done.max_in_flight} at once at most",
        soft_wrap=True,
    )


def _print_ready(server: SimulationServer) -> None:
    rows = ",\n       ".join(
        f"({_quoted(f'{name}-over-http')}, 'openai_compatible', {_quoted(name)}, {_quoted(server.url)})"
        for name in server.models
    )
    stdout.print(
        _READY.format(url=server.url, root=server.url.removesuffix("/v1"), rows=rows), markup=False, soft_wrap=True
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


_READY = """\
serving {url} (counts: {root}/stats); Ctrl-C ends it. As a model:

insert into pgharness.models (name, provider, model, base_url)
values {rows};
"""
