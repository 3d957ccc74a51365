"""The notebook in experiments/ does what it says, on the results of a run: its cells are executed in their order."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgharness import Context, experiment
from pgharness.sdk import direct, discovery
from pgharness.settings import Settings

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NOTEBOOK: dict[str, Any] = json.loads((EXPERIMENTS / "analysis.ipynb").read_text())
_CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@experiment(name="response")
def response(ctx: Context) -> None:
    ctx.result("model_response", {"input": "2 + 2", "output": {"text": "4", "tokens": 1}})
    ctx.result("note", "not an object")
    ctx.metric("accuracy", 0.75)
    ctx.metric("accuracy", 1.0, data={"fold": 2})


def executed(monkeypatch: pytest.MonkeyPatch, url: str, run: str) -> tuple[dict[str, Any], str]:
    """Return the names of the notebook after all cells were executed, and what they printed."""
    pytest.importorskip("pandas", reason="pandas is in the extra `notebook`")
    monkeypatch.setenv("PGHARNESS_DATABASE_URL", url)
    monkeypatch.setenv("RUN", run)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for source in _CODE:
            exec(compile(source, "analysis.ipynb", "exec"), names)
    return names, printed.getvalue()


def test_it_is_a_notebook_of_format_4_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert set(NOTEBOOK) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", each) for each in ids)
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            ast.parse("".join(cell["source"]))


def test_it_loads_the_results_of_any_run(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    direct.execute(response, url=url, settings=Settings.from_env(), is_echoed=False)
    names, _ = executed(monkeypatch, url, "response/1")
    assert set(names["results"]["key"]) == {"model_response", "note"}
    (row,) = names["wide"].to_dict("records")
    assert (row["key"], row["output.text"], row["output.tokens"]) == ("model_response", "4", 1)
    assert names["summary"].loc["accuracy"].to_dict() == {"count": 2, "mean": 0.875, "min": 0.75, "max": 1.0}
    assert names["metrics"]["fold"].tolist()[1] == 2
    assert names["tasks"].empty and len(names["conversations"]) == 0


def test_it_shows_the_conversations_of_substrate_shift(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = EXPERIMENTS / "substrate_shift"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((folder / "models.sql").read_bytes())
    config = {
        "model_pairs": [{"first": "substrate/a", "second": "substrate/b"}],
        "runs_per_pair": 2,
        "switch_turns": [0, 2],
        "turns": 3,
    }
    shift = discovery.discover([str(folder)]).experiments["substrate_shift"]
    direct.execute(shift, url=url, settings=Settings.from_env(), config=config, is_echoed=False)
    names, printed = executed(monkeypatch, url, "substrate_shift/1")
    assert sorted(names["conversations"]["switch_turn"]) == [0, 0, 2, 2]
    assert names["turns"]["model"].value_counts().to_dict() == {"substrate/a": 8, "substrate/b": 4}
    assert names["states"].loc["succeeded", "count"] == 4
    assert "substrate/a -> substrate/b" in printed and "switch_turn" in printed
