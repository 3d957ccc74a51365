"""@experiment: what it makes of a function or a class, how it reads a configuration, and what it says of the source."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from pgharness.errors import InvalidArgument
from pgharness.sdk.classes import Runnable
from pgharness.sdk.definition import Experiment, experiment, source_files
from pgharness.sdk.discovery import load

if TYPE_CHECKING:
    from nowhere import Missing


class Sampling(BaseModel):
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7


class Config(BaseModel):
    second: int
    first: str = "a"
    sampling: Sampling = Sampling()


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    seed: int = None  # type: ignore[assignment]  # as people write it


# -- defining


@experiment
def bare(ctx: object, config: Config) -> tuple[object, int]:
    """Say what it is for.

    And more.
    """
    return ctx, config.second


def test_a_bare_decorator_takes_name_and_description_from_the_function() -> None:
    assert (bare.name, bare.description) == ("bare", "Say what it is for.\n\nAnd more.")
    assert (bare.timeout_seconds, bare.memory_mb, bare.log_mb) == (3600, 4096, 64)
    assert bare.module == __name__ or bare.module.startswith("path:")
    assert bare.qualname == bare.__name__ == "bare"


def test_options_are_kept_and_an_empty_call_is_a_bare_decorator() -> None:
    @experiment(name="x", description="d", timeout_seconds=1.5, memory_mb=10, log_mb=2)
    def one() -> None: ...

    @experiment()
    def two() -> None: ...

    assert (one.name, one.description, one.timeout_seconds, one.memory_mb, one.log_mb) == ("x", "d", 1.5, 10, 2)
    assert (two.name, two.description) == ("two", "")


def test_a_decorated_function_stays_a_function() -> None:
    assert bare("context", Config(second=2)) == ("context", 2)
    assert bare(ctx="context", config=Config(second=3)) == ("context", 3)


def _local_models() -> list[tuple[Callable[..., Any], bool, type[BaseModel] | None]]:
    class Local(BaseModel):
        x: int = 1

    @experiment
    def both(ctx: object, config: Local) -> None: ...

    @experiment
    def reversed_order(settings: Local, anything: object) -> None: ...

    @experiment
    def only_config(config: Annotated[Local, "said so"]) -> None: ...

    @experiment
    def only_context(ctx) -> None: ...  # type: ignore[no-untyped-def]

    @experiment
    def unknown_context(ctx: Missing) -> None: ...

    @experiment
    def nothing() -> None: ...

    @experiment
    def optional(ctx: object, config: Local | None = None, retries: int = 3) -> None: ...

    @experiment
    def keywords(*, ctx: object, config: Local, **more: object) -> None: ...

    return [
        (both, True, Local),
        (reversed_order, True, Local),
        (only_config, False, Local),
        (only_context, True, None),
        (unknown_context, True, None),
        (nothing, False, None),
        (optional, True, Local),
        (keywords, True, Local),
    ]


def test_parameters_say_what_is_context_and_what_is_config() -> None:
    for defined, takes_context, model in _local_models():
        assert isinstance(defined, Experiment)
        assert (defined.takes_context, defined.config_model) == (takes_context, model), defined.name
        assert defined.takes_config is (model is not None)
        assert defined.start("context", model() if model else None) is None, defined.name


def test_start_hands_over_each_by_its_place() -> None:
    @experiment
    def swapped(config: Sampling, ctx: object, retries: int = 3) -> object:
        return ctx, config, retries

    config = Sampling()
    assert swapped.start("context", config) == ("context", config, 3)


async def test_async_functions_are_known_as_such() -> None:
    @experiment
    async def slow(ctx: object) -> object:
        await asyncio.sleep(0)
        return ctx

    assert slow.is_async and not bare.is_async
    assert await slow("context") == "context"
    assert await slow.start("context", None) == "context"


def test_a_class_with_stages_is_an_experiment() -> None:
    @experiment(name="staged")
    class Staged(Runnable):
        """Run in stages."""

        config: Sampling

        def run(self) -> float:
            return float(self.config.temperature)

    assert (Staged.name, Staged.description, Staged.config_model) == ("staged", "Run in stages.", Sampling)
    assert Staged.takes_context and Staged.takes_config and not Staged.is_async
    assert Staged.start(None, Sampling(temperature=2)) == 2

    @experiment
    class Untyped(Runnable):
        async def run(self) -> None: ...

    assert Untyped.config_model is None and Untyped.is_async and Untyped.description == ""


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"name": ""}, "''"),
        ({"name": " x"}, "' x'"),
        ({"name": 3}, "3"),
        ({"name": "note_grade"}, "built-in"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds"),
        ({"memory_mb": -1}, "memory_mb"),
        ({"memory_mb": "4 GB"}, "memory_mb"),
        ({"log_mb": True}, "log_mb"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidArgument, match=word) as caught:
        experiment(**options)(lambda: None)
    assert caught.value.hint


def test_functions_that_could_not_be_called_are_refused() -> None:
    def two_contexts(a: object, b: object) -> None: ...
    def two_configs(a: Config, b: Sampling) -> None: ...
    def unknown_config(ctx: object, config: Missing) -> None: ...

    class Nothing:
        pass

    class Abstract(Runnable):
        pass

    for wrong, word in (
        (two_contexts, "a, b"),
        (two_configs, "2 configurations"),
        (unknown_config, "Missing"),
        (Nothing, "no method run"),
        (Abstract, "no method run"),
        (bare, "no function"),
        (3, "no function"),
    ):
        with pytest.raises(InvalidArgument, match=word) as caught:
            experiment(wrong)  # type: ignore[call-overload]
        assert caught.value.hint


# -- configuration


def test_the_schema_is_closed_titled_and_in_order() -> None:
    schema = bare.config_schema()
    assert list(schema["properties"]) == schema["propertyOrder"] == ["second", "first", "sampling"]
    assert [property["title"] for property in schema["properties"].values()] == ["Second", "First", "Sampling"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Sampling"]["additionalProperties"] is False
    assert schema["properties"]["sampling"]["default"] == {"temperature": 0.7}


def test_without_a_model_nothing_may_be_configured() -> None:
    @experiment
    def plain() -> None: ...

    assert plain.config_schema() == {"type": "object", "additionalProperties": False}
    assert plain.config({}) is None and plain.config(None) is None
    with pytest.raises(InvalidArgument, match=r"config.x is not a known property"):
        plain.config({"x": 1})


def test_a_model_may_be_open_and_a_default_that_does_not_fit_is_left_to_python() -> None:
    @experiment
    def loose(config: Open) -> None: ...

    schema = loose.config_schema()
    assert schema["additionalProperties"] is True and "default" not in schema["properties"]["seed"]
    found = loose.config({"more": 1})
    assert isinstance(found, Open) and found.seed is None and found.model_extra == {"more": 1}


def test_a_config_is_read_from_json_values_or_taken_as_it_is() -> None:
    assert bare.config({"second": 2.0, "sampling": {"temperature": 1}}) == Config(
        second=2, sampling=Sampling(temperature=1)
    )
    config = Config(second=1)
    assert bare.config(config) is config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "config.second is missing"),
        (None, "config.second is missing"),
        ({"second": "2"}, 'config.second is "2": input should be a valid integer'),
        ({"second": 1, "sampling": {"temperature": 3}}, "config.sampling.temperature is 3: input should be less"),
        ({"second": 1, "sampling": {"temprature": 1}}, "config.sampling.temprature is not a known property"),
        ({"second": 1, "a b": 1}, 'config["a b"] is not a known property; known are "first", "sampling", "second"'),
        ({"second": float("nan")}, "config.second is nan, no number in JSON"),
        ({"second": 1, "sampling": 3}, "config.sampling is 3"),
    ],
)
def test_a_wrong_config_names_the_field(value: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        bare.config(value)
    assert str(caught.value).startswith(message)
    assert caught.value.hint == "See what is allowed: pgharness experiments show bare" and caught.value.detail


def test_locations_do_not_name_the_alternatives_of_a_union() -> None:
    class One(BaseModel):
        kind: Literal["one"] = "one"
        size: Annotated[int, Field(ge=0)]

    class Two(BaseModel):
        kind: Literal["two"] = "two"

    class Both(BaseModel):
        parts: list[Annotated[One | Two, Field(discriminator="kind")]] = []
        price: Decimal = Decimal("0.5")

    @experiment
    def union(config: Both) -> None: ...

    with pytest.raises(InvalidArgument, match=r"^config.parts\[0\].size is -1"):
        union.config({"parts": [{"kind": "one", "size": -1}]})
    with pytest.raises(InvalidArgument, match=r"^config.parts\[0\]"):
        union.config({"parts": [{"size": 1}]})
    assert union.config_schema()["properties"]["price"]["default"] == 0.5


def test_a_config_without_a_json_form_is_refused() -> None:
    class Calls(BaseModel):
        function: Callable[[], int]

    @experiment
    def calls(config: Calls) -> None: ...

    with pytest.raises(InvalidArgument, match="Calls has no JSON Schema"):
        calls.config_schema()
    with pytest.raises(InvalidArgument, match="no JSON"):
        bare.config({"second": object()})


# -- source

SOURCE = """
from pgharness.sdk.definition import experiment
import helper
@experiment
def run(): ...
"""


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / ".pgharness").write_text("")
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "one.py").write_text(SOURCE)
    (folder / "helper.py").write_text("import shared.deep\nfrom shared import near\n")
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("__init__", "deep", "near", "unused"):
        (shared / f"{name}.py").write_text("from . import deep\n" if name == "near" else "")
    return tmp_path


def digest_of(project: Path) -> str:
    found = load("path:experiments/one.py", "run", project)
    return Experiment(found.function).version().digest  # read anew


def test_the_digest_covers_what_is_imported_from_the_project(project: Path) -> None:
    names = [path.relative_to(project).as_posix() for path in source_files(project / "experiments/one.py", project)]
    assert names == [
        "experiments/helper.py",
        "experiments/one.py",
        "shared/__init__.py",
        "shared/deep.py",
        "shared/near.py",
    ]
    before = digest_of(project)
    (project / "shared/unused.py").write_text("x = 1")
    assert digest_of(project) == before
    (project / "shared/deep.py").write_text("x = 1")
    assert digest_of(project) != before


def test_a_version_says_what_differs_from_the_commit(project: Path) -> None:
    run = load("path:experiments/one.py", "run", project)
    version = run.version()
    assert version.source == SOURCE and (version.git_commit, version.is_dirty, version.git_diff) == (None, False, "")
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "all")

    def state() -> tuple[str | None, bool, str]:
        from pgharness.sdk.definition import forget_git

        forget_git()
        found = Experiment(run.function).version()
        return found.git_commit, found.is_dirty, found.git_diff

    commit = git(project, "rev-parse", "HEAD")
    assert state() == (commit, False, "")
    (project / "unrelated").write_text("not code")
    assert state() == (commit, False, "")
    (project / "shared/deep.py").write_text("x = 'new\0'\n")
    found = state()
    assert found[:2] == (commit, True)
    git(project, "checkout", "-q", "shared")
    (project / "experiments/helper.py").write_text("import late\n")
    (project / "experiments/late.py").write_text("LATE = 1\n")
    _, is_dirty, diff = state()
    assert is_dirty and "+import late" in diff and "+++ b/experiments/late.py" in diff and "+LATE = 1" in diff
    (project / "experiments/late.py").write_text("# x\n" * 400_000)
    _, _, diff = state()
    assert len(diff) <= 1_000_000 and diff.endswith("(cut: the diff is larger)\n")


def test_registration_holds_what_the_database_wants() -> None:
    assert set(bare.registration()) == {
        *("name", "description", "module", "function", "digest", "source", "config_schema"),
        *("timeout_seconds", "memory_mb", "log_mb", "git_commit", "is_dirty", "git_diff"),
    }
