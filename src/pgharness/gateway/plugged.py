"""Provider `plugin`, and metrics `plugin:NAME`: functions that an operator installed answer and score.

A model's function is called as one of provider `python` is. A metric's is called as

    function(output, target, **parameters)

with the note, the case's target (None where it has none) and the options of the model. It returns a number from 0 to 1,
or a score and the most that could be reached, and may be sync or async, under the same rules of threads and timeouts.
What cannot be imported is found out beside this process, before the first call and out of its time.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any, ClassVar

from pgharness import plugins
from pgharness.errors import InvalidOutput, NotFound, PluginBroken, RequestRejected, Unavailable
from pgharness.gateway.callables import Function
from pgharness.types import Completion, ModelSpec, Request

METRIC_PREFIX = "plugin:"
_LARGEST_SCORE = 1_000_000
_SMALLEST_MAXIMUM = 0.001  # the database keeps four digits behind the point


class PluginModel(Function):
    """Answer with a plugin."""

    _kind: ClassVar[plugins.Kind] = "models"

    def __init__(self, spec: ModelSpec, *, seconds: float) -> None:
        self._plugin = spec.model.removeprefix(METRIC_PREFIX) if spec.provider == "metric" else spec.model
        super().__init__(spec, f'plugin "{self._plugin}"')
        self._seconds = seconds

    async def __call__(self, request: Request) -> Completion:
        """Return what the plugin answers to this request."""
        if self._function is None:
            self._function = await self._in_thread(self._found)
        return await super().__call__(request)

    def _found(self) -> Callable[..., Any]:
        try:
            return plugins.load(self._kind, self._plugin, seconds=self._seconds)
        except (PluginBroken, NotFound) as exc:
            text = self._kept(exc.text) if isinstance(exc, PluginBroken) and exc.text else None
            again = "Then select pgharness.retry_failed(run_id => ...);"
            raise RequestRejected(
                f"model '{self._spec.name}': {self._kept(str(exc))}", text=text, hint=f"{exc.hint} {again}"
            ) from exc
        except OSError as exc:
            raise Unavailable(f"this host cannot start another process: {exc}") from exc


class PluginMetric(PluginModel):
    """Score with a plugin: the answer's data are a score and its maximum."""

    _kind: ClassVar[plugins.Kind] = "metrics"
    _given: ClassVar[str] = "an output, a target"

    def _arguments(self, request: Request) -> tuple[Any, ...]:
        return copy.deepcopy((request.item.get("output"), request.item.get("target")))

    def _completion(self, answer: object, *, wants_json: bool) -> Completion:
        score, most = answer if isinstance(answer, tuple | list) and len(answer) == 2 else (answer, 1.0)
        try:
            numbers = [_number(score), _number(most)]
        except (TypeError, ValueError, OverflowError):
            numbers = [math.nan, math.nan]
        score, most = numbers
        if not (0 <= score <= most and _SMALLEST_MAXIMUM <= most <= _LARGEST_SCORE):
            raise InvalidOutput(
                f"{self._what} gave {self._kept(repr(answer))[:200]}, which is no score",
                text=self._kept(repr(answer))[:1000],
                hint="It has to return a number from 0 to 1, or (score, max_score) with 0 <= score <= max_score.",
            )
        return Completion(text=json.dumps(numbers), data={"score": score, "max_score": most})


def _number(value: Any) -> float:
    """Return a number as a float: also one of numpy's, but no text that looks like one."""
    if isinstance(value, str | bytes):
        raise TypeError
    return round(float(value), 9)
