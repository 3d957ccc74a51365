"""Everything that answers is a Completer: providers over HTTP, programs, Python callables, plugins, the simulator.

Composites (ensembles, hedges) are Completers of Completers. One request is one call of each: nothing here retries,
because tries are durable rows and belong to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgharness.database import Database
from pgharness.errors import RequestRejected
from pgharness.gateway.cache import Answers
from pgharness.gateway.callables import PythonCallable
from pgharness.gateway.calls import Member
from pgharness.gateway.command import Command
from pgharness.gateway.ensemble import Ensemble
from pgharness.gateway.ensemble_options import EnsembleParameters
from pgharness.gateway.hedging import Hedge, HedgeParameters
from pgharness.gateway.limits import Limits
from pgharness.gateway.observations import Observations
from pgharness.gateway.plugged import METRIC_PREFIX, PluginMetric, PluginModel
from pgharness.gateway.simulator import Simulator
from pgharness.gateway.transport import Account, Transport
from pgharness.plugins import IMPORT_SECONDS
from pgharness.types import Completer, ModelSpec

__all__ = ["Gateway"]

_OPTIONS = EnsembleParameters.model_fields.keys() | HedgeParameters.model_fields.keys()


class Gateway:
    """Makes the Completer of a model; owns the one HTTP client of the process.

    `allows_code` says whether `command` and `python` models may run here: they execute what a database row names, so a
    worker has to be told to trust its database's authors. Plugins are what an operator installed, so they may run
    anywhere; `plugin_seconds` is how long importing one may take. `database` is where workers share what they learn
    about models; without one, each process learns alone.
    """

    def __init__(
        self,
        *,
        cache_root: Path,
        allows_code: bool = False,
        plugin_seconds: float = IMPORT_SECONDS,
        transport: Transport | None = None,
        database: Database | None = None,
    ) -> None:
        self._cache_root = cache_root
        self._allows_code = allows_code
        self._plugin_seconds = plugin_seconds
        self._transport = transport or Transport()
        self._observations = Observations(database)
        self._code: dict[str, Completer] = {}

    def completer(self, spec: ModelSpec, limits: Limits | None = None, answers: Answers | None = None) -> Completer:
        """Return what answers for a model. Raises RequestRejected for one that this worker does not run.

        Whoever calls it keeps to the model's own limits; the members of a composite keep to theirs by `limits`.
        Likewise whoever calls it looks into the response cache first, and members look by `answers`.
        """
        match spec.provider:
            case "ensemble":
                return Ensemble(spec, self._members(spec, limits, answers), allows_code=self._allows_code)
            case "hedge":
                return Hedge(spec, self._members(spec, limits, answers), self._observations)
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

    @staticmethod
    def laid_over(spec: ModelSpec, parameters: Mapping[str, Any]) -> tuple[ModelSpec, Mapping[str, Any]]:
        """Return a model with parameters laid over its own, and those that it takes with each request instead.

        The options of a composite are its own, and others its members'.
        """
        if spec.members:
            own = {name: value for name, value in parameters.items() if name in _OPTIONS}
            others = {name: value for name, value in parameters.items() if name not in _OPTIONS}
            members = tuple(Gateway.laid_over(member, others)[0] for member in spec.members)
            return spec.model_copy(update={"parameters": {**spec.parameters, **own}, "members": members}), others
        if spec.provider in ("simulator", "command"):
            return spec.model_copy(update={"parameters": {**spec.parameters, **parameters}}), {}
        return spec, parameters

    def account(self, spec: ModelSpec) -> Account:
        """Return what else the vendor of a model does for the holder of its key: files and batches."""
        return self._transport.account(spec)

    def _members(self, spec: ModelSpec, limits: Limits | None, answers: Answers | None) -> list[Member]:
        return [Member(member, self.completer(member, limits, answers), limits, answers) for member in spec.members]

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
        await self._observations.aclose()
        await self._transport.aclose()
