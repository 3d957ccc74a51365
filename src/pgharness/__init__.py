"""pgharness: LLM experiments in Postgres.

The names for experiments in code are made when they are first asked for: most programs need none of them.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pgharness")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

_PLACES = {
    "AsyncContext": "scope",
    "Cancelled": "scope",
    "Context": "scope",
    "RunType": "manual",
    "Runnable": "classes",
    "TaskFailed": "scope",
    "Tracker": "manual",
    "batch_processor": "decorators",
    "experiment": "definition",
    "llm_call": "decorators",
    "metric": "decorators",
    "timer": "decorators",
}

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"pgharness.sdk.{_PLACES[name]}"), name)
