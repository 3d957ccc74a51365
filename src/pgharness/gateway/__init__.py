"""Everything that answers is a Completer: providers over HTTP, programs, Python callables, plugins, the simulator.

One request is one call: nothing here retries, because tries are durable rows and belong to the caller.
"""

from __future__ import annotations

from pathlib import Path

from pgharness.errors import RequestRejected
from pgharness.gateway.callables import PythonCallable
from pgharness.gateway.command import Command
from pgharness.gateway.plugged import METRIC_PREFIX, PluginMetric, PluginModel
from pgharness.gateway.simulator import Simulator
from pgharness.gateway.transport import Transport
from pgharness.plugins import IMPORT_SECONDS
from pgharness.types import Completer, ModelSpec

__all__ = ["Gateway"]


class Gateway:
    """Makes the Completer of a model; owns the one HTTP client of the process.

    `allows_code` says whether `command` and `python` models may run here: they execute what a database row names, so a
    worker has to be told to trust its database's authors. Plugins are what an operator installed, so they may run
    anywhere; `plugin_seconds` is how long importing one may take.
    """

    def __init__(
        self,
        *,
        cache_root: Path,
        allows_code: bool = False,
        plugin_seconds: float = IMPORT_SECONDS,
        transport: Transport | None = None,
    ) -> None:
        self._cache_root = cache_root
        self._allows_code = allows_code
        self._plugin_seconds = plugin_seconds
        self._transport = transport or Transport()
        self._code: dict[str, Completer] = {}

    def completer(self, spec: ModelSpec) -> Completer:
        """Return what answers for a model. Raises RequestRejected for one that this worker does not run."""
        match spec.provider:
            case "simulator":
                return Simulator(spec)
            case "command" | "python":
                if not self._allows_code:
                    raise RequestRejected(
                        f"model '{spec.name}' runs code ({spec.provider}), which this worker does not allow",
                        hint="Start workers with --allow-code if you trust everyone who may insert models, "
                        "then select pgharness.retry_failed(run_id => ...);",
                    )
                return self._kept(spec)
            case "plugin":
                return self._kept(spec)
            case "metric" if spec.model.startswith(METRIC_PREFIX):
                return self._kept(spec)
            case "metric":
                raise RequestRejected(f"model '{spec.name}' is a metric, which writes no notes")
            case _:
                return self._transport.completer(spec)

    def _kept(self, spec: ModelSpec) -> Completer:
        """Return the one for all runs: it bounds its threads, and keeps to the commit it first resolved."""
        key = spec.model_dump_json()
        if key not in self._code:
            match spec.provider:
                case "command":
                    self._code[key] = Command(spec, cache_root=self._cache_root)
                case "python":
                    self._code[key] = PythonCallable(spec)
                case "plugin":
                    self._code[key] = PluginModel(spec, seconds=self._plugin_seconds)
                case _:
                    self._code[key] = PluginMetric(spec, seconds=self._plugin_seconds)
        return self._code[key]

    async def aclose(self) -> None:
        await self._transport.aclose()
