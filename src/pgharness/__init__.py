"""pgharness: LLM experiments in Postgres."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pgharness")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
