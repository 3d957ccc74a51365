"""Adjusted p-values agree with statsmodels, with closed testing written out, and with published tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
from pingouin import multicomp
from statsmodels.stats.multitest import multipletests

from pgharness.stats.multiplicity import Correction, adjust
from pgharness.stats.samples import InvalidSample

THEIRS: dict[Correction, str] = {
    "bonferroni": "bonferroni",
    "holm": "holm",
    "hochberg": "simes-hochberg",
    "bh": "fdr_bh",
    "by": "fdr_by",
}
# Benjamini & Hochberg (1995), table of 15 p-values of the rt-PA and APSAC trial
TRIAL = [
    0.0001,
    0.0004,
    0.0019,
    0.0095,
    0.0201,
    0.0278,
    0.0298,
    0.0344,
    0.0459,
    0.3240,
    0.4262,
    0.5719,
    0.6528,
    0.7590,
    1.0,
]


@pytest.mark.parametrize("correction", THEIRS)
def test_adjusted_p_values_agree_with_statsmodels(correction: Correction) -> None:
    rng = np.random.default_rng(61)
    for number in range(200):
        p_values = rng.random(int(rng.integers(1, 40))) ** 3
        if number % 3 == 0:
            p_values = np.round(p_values, 1)  # ties, zeros and ones
        if correction == "holm":  # pingouin's, because statsmodels takes a quarter of a second for each family
            expected = multicomp(p_values, method="holm")[1]
        else:
            expected = multipletests(p_values, method=THEIRS[correction])[1]
        assert adjust(p_values, correction=correction).adjusted == pytest.approx(expected, rel=1e-10, abs=1e-15)


def test_holm_is_closed_testing_with_bonferroni() -> None:
    rng = np.random.default_rng(62)
    for _ in range(200):
        p_values = rng.random(int(rng.integers(1, 7))) ** 2
        everyone = range(len(p_values))
        subsets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(everyone, size)]
        tests = {s: min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets}
        expected = [max(value for s, value in tests.items() if i in s) for i in everyone]
        assert adjust(p_values).adjusted == pytest.approx(expected, rel=1e-10)


def test_the_published_trial_has_its_published_rejections() -> None:
    assert len(adjust(TRIAL, correction="bonferroni").significant()) == 3
    assert len(adjust(TRIAL, correction="hochberg").significant()) == 3
    assert len(adjust(TRIAL, correction="bh").significant()) == 4


def test_the_order_of_power_is_kept() -> None:
    rng = np.random.default_rng(63)
    for _ in range(100):
        p_values = rng.random(10) ** 3
        found = {name: np.array(adjust(p_values, correction=name).adjusted) for name in THEIRS}
        assert (found["bonferroni"] >= found["holm"] - 1e-15).all()
        assert (found["holm"] >= found["hochberg"] - 1e-15).all()
        assert (found["hochberg"] >= found["bh"] - 1e-15).all()
        assert (found["by"] >= found["bh"] - 1e-15).all()
        assert all((values >= p_values - 1e-15).all() and (values <= 1).all() for values in found.values())


def test_names_stay_with_their_tests() -> None:
    found = adjust({"old": 0.04, "new": 0.001})
    assert found.names == ("old", "new")
    assert found.adjusted == pytest.approx((0.04, 0.002))
    assert found.significant(0.01) == ("new",)
    assert json.loads(json.dumps(found.as_dict()))["adjusted"] == pytest.approx([0.04, 0.002])
    assert adjust([0.5]).names == ("test 1",)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adjust([]), "p_values: empty"),
        (lambda: adjust([0.5, np.nan]), "1 missing value"),
        (lambda: adjust([0.5, 1.2]), r"p_values has 1.2: p-values are in 0..1"),
        (lambda: adjust([0.5], correction="sidak"), "correction is 'sidak'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
