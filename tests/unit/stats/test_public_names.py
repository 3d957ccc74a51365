"""The package's public names exist, are documented, are typed in the stub, and cost nothing until they are used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pgharness.stats as package

FOLDER = Path(package.__file__ or "").parent


@pytest.mark.parametrize("name", package.__all__)
def test_a_public_name_exists_and_is_documented(name: str) -> None:
    assert (getattr(package, name).__doc__ or "").strip().endswith(tuple(".)"))


def test_the_stub_has_the_same_names() -> None:
    stub = (FOLDER / "__init__.pyi").read_text()
    assert (
        re.findall(r"import (\w+) as \1", stub) and sorted(re.findall(r"import (\w+) as \1", stub)) == package.__all__
    )
    assert dir(package) == package.__all__
    with pytest.raises(AttributeError, match="has no attribute 'mode'"):
        _ = package.mode  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "numpy", "scipy", "statsmodels", "pandas"
    code = f"import pgharness.stats, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import pgharness.stats as s, sys; s.compare; s.adjust; s.pearson; s.fisher_exact"
    code += "; print([m for m in ('statsmodels', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
