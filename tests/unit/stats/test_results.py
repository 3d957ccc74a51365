"""Results present themselves: sentences as the APA writes them, and values that JSON can hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pgharness.stats.results import (
    Assumption,
    Comparison,
    Effect,
    Estimate,
    Group,
    Interval,
    Result,
    apa_number,
    apa_p,
    apa_statistic,
    json_safe,
)


def welch(p_value: float = 0.0002) -> Result:
    return Result(
        test="Welch t test",
        statistic=-6.985,
        statistic_name="t",
        p_value=p_value,
        n=(5, 5),
        df=7.9812,
        estimate=-0.07,
        estimate_name="mean difference",
        interval=Interval(-0.0931, -0.0469),
        effect=Effect("Hedges g", -3.99, Interval(-6.5, -1.6), "large", "Cohen (1988)"),
        groups=(Group("control", 5, 0.89, 0.0158, 0.89), Group("treatment", 5, 0.96, 0.0158, 0.96)),
    )


def test_a_sentence_has_groups_statistic_p_estimate_and_effect() -> None:
    assert welch().apa == (
        "Welch t test (control: M = 0.89, SD = 0.016; treatment: M = 0.96, SD = 0.016): the result was significant at the "
        ".05 level, t(7.98) = -6.99, p < .001, mean difference = -0.070, 95% CI [-0.093, -0.047], "
        "Hedges g = -3.99, 95% CI [-6.50, -1.60]."
    )


def test_only_a_small_p_value_is_called_significant() -> None:
    assert "significant" not in welch(0.05).apa
    assert "did not reach the .05 level" in welch(0.05).apa
    assert not welch(0.05).is_significant()
    assert welch(0.05).is_significant(0.1)
    assert welch(0.049).is_significant()


@pytest.mark.parametrize(
    ("p_value", "text"),
    [(0.0001, "p < .001"), (0.0312, "p = .031"), (0.5, "p = .500"), (0.99999, "p > .999"), (math.nan, "p undefined")],
)
def test_p_values_have_three_decimals_and_no_leading_zero(p_value: float, text: str) -> None:
    assert apa_p(p_value) == text


def test_statistics_are_written_with_their_degrees_of_freedom() -> None:
    assert apa_statistic("t", 2.2624, 9) == "t(9) = 2.26"
    assert apa_statistic("F", 3.354, (2, 27)) == "F(2, 27) = 3.35"
    assert apa_statistic("F", 3.354, (1.52, 27.36)) == "F(1.52, 27.36) = 3.35"
    assert apa_statistic("chi2", 3.841, 1, (20, 20)) == "chi2(1, N = 40) = 3.84"
    assert apa_statistic("r", -0.456, 28) == "r(28) = -.46"
    assert apa_statistic("U", 12.0) == "U = 12.00"


@pytest.mark.parametrize(
    ("value", "bounded", "text"),
    [
        (0.5, False, "0.50"),
        (0.5, True, ".50"),
        (-0.5, True, "-.50"),
        (1.0, True, "1.00"),
        (0.00012, False, "0.00012"),
        (1.2e-9, False, "1.2e-09"),
        (-0.0001, True, ".00"),
        (0.0, False, "0.00"),
        (1234567.891, False, "1234567.89"),
        (math.inf, False, "infinity"),
        (math.nan, False, "undefined"),
    ],
)
def test_numbers_keep_two_digits_that_mean_something(value: float, bounded: bool, text: str) -> None:
    assert apa_number(value, bounded=bounded) == text


def test_every_result_survives_json() -> None:
    result = Result(
        test="x",
        statistic=math.inf,
        statistic_name="F",
        p_value=math.nan,
        n=3,
        df=(1.0, math.nan),
        interval=Interval(-math.inf, 2.0),
        comparisons=(Comparison("a", "b", 1.0, 2.0, 0.03),),
        assumptions=(Assumption("normality", "Shapiro-Wilk", 0.9, 0.2, None),),
        warnings=("w",),
    )
    value = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert value["statistic"] is None
    assert value["p_value"] is None
    assert value["df"] == [1.0, None]
    assert value["interval"]["low"] is None
    assert value["comparisons"][0]["p_value"] == 0.03
    assert value["assumptions"][0]["is_met"] is None
    assert value["apa"].startswith("x: ")


def test_numpy_values_become_plain_ones() -> None:
    assert json_safe({1: np.float64(2.5), "a": np.array([1.0, np.nan]), "b": np.int64(3), "c": np.bool_(True)}) == {
        "1": 2.5,
        "a": [1.0, None],
        "b": 3,
        "c": True,
    }


def test_intervals_and_estimates() -> None:
    interval = Interval(0.0, 1.0)
    assert 0.5 in interval and 1.5 not in interval and interval.width == 1.0
    estimate = Estimate("mean", 0.5, 0.1, interval, 12)
    assert estimate.apa == "mean = 0.50, 95% CI [0.00, 1.00]"
    assert estimate.as_dict()["n"] == 12
    assert Comparison("a", "b", 1.0, 2.0, 0.03).is_significant()
