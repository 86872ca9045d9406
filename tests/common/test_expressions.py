"""The language of a claim's metric: arithmetic, pairing by seed, and errors that name the way out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.expressions import Expression, ExpressionError, MetricError

METRICS = {
    "psnr": {
        "gloredi": {"0": 30.0, "1": 31.0, "2": 33.0},
        "fbp": {"all": 20.0},
        "18": {"0": 20.0, "1": 21.0},
        "36": {"0": 24.0, "1": 20.5},
        "72": {"0": 25.0, "1": 30.0},
    },
    "adjoint": {"": {"all": 2e-7}},
    "late": {"": {"7": 1.0}},
    "nan": {"": {"0": float("nan"), "1": 1.0}},
    "mixed": {"": {"all": 1.0, "0": 2.0}},
}


def values(text):
    return Expression(text).evaluate(METRICS).values


def test_arms_are_paired_by_seed_and_unseeded_metrics_broadcast():
    measured = Expression("psnr[gloredi] - psnr[fbp]").evaluate(METRICS)
    assert measured.values == (10.0, 11.0, 13.0)
    assert measured.seeds == ("0", "1", "2")


def test_seeds_missing_in_one_arm_are_left_out_and_named():
    measured = Expression("psnr[gloredi] - psnr[18]").evaluate(METRICS)
    assert measured.values == (10.0, 10.0)
    assert measured.left_out == ("2",)


def test_a_measurement_without_seeds_is_one_value():
    measured = Expression("adjoint").evaluate(METRICS)
    assert (measured.values, measured.seeds) == ((2e-7,), ())


def test_seeds_are_ordered_as_numbers():
    ordered = Expression("a").evaluate({"a": {"": {"10": 1.0, "9": 2.0, "b": 3.0}}})
    assert ordered.seeds == ("9", "10", "b") or ordered.seeds == ("b", "9", "10")
    assert ordered.seeds.index("9") < ordered.seeds.index("10")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("increasing(psnr[18], psnr[36], psnr[72])", (1.0, -0.5)),
        ("decreasing(psnr[72], psnr[36])", (1.0, 9.5)),
        ("max(psnr[18], psnr[36]) - min(psnr[18], psnr[36])", (4.0, 0.5)),
        ("mean(psnr[18], psnr[36])", (22.0, 20.75)),
        ("abs(psnr[18] - 20.5)", (0.5, 0.5)),
        ("-psnr[18] + 2 * (psnr[36] - 4) / 2", (0.0, -4.5)),
        ("psnr[ 18 ] - 1e1 - 2", (8.0, 9.0)),
        ("8 / 4 / psnr[18] * psnr[18]", (2.0, 2.0)),
    ],
)
def test_arithmetic_and_functions(text, expected):
    assert values(text) == pytest.approx(expected)


@given(st.recursive(st.sampled_from(["a", "b[x]", "2", "0.5", "3e-1"]), lambda part: st.one_of(
    st.tuples(part, st.sampled_from("+-*"), part).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    part.map(lambda text: f"-{text}"),
    st.tuples(part, part).map(lambda t: f"max({t[0]}, {t[1]})"),
), max_leaves=12))  # fmt: skip
def test_arithmetic_is_pythons(text):
    if "a" not in text.replace("max", "") and "b" not in text:
        return
    record = {"a": {"": {"all": 1.75}}, "b": {"x": {"all": -3.0}}}
    expected = eval(text.replace("b[x]", "b"), {"a": 1.75, "b": -3.0, "max": max})
    assert Expression(text).evaluate(record).values[0] == pytest.approx(expected)


def test_the_metrics_read_are_listed_once():
    assert Expression("psnr[a] / (psnr[b] - psnr[a]) + rmse").metrics == (("psnr", "a"), ("psnr", "b"), ("rmse", ""))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("1 + 2", "reads no metric"),
        ("psnr[a] -", "got the end"),
        ("psnr[a", "cannot read"),
        ("(psnr[a]", r"expected '\)'"),
        ("psnr[a] psnr[b]", "expected an operator"),
        ("psnr[a] ** 2", "expected a metric"),
        ("median(psnr[a], psnr[b])", "no function"),
        ("increasin(psnr[a], psnr[b])", "did you mean 'increasing'"),
        ("increasing(psnr[a])", "at least 2"),
        ("abs(psnr[a], psnr[b])", "expected 1"),
        ("__import__('os')", "cannot read"),
        ("psnr.real", "cannot read"),
    ],
)
def test_faults_of_writing_are_told(text, told):
    with pytest.raises(ExpressionError, match=told):
        Expression(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pnsr[fbp]", "did you mean 'psnr'"),
        ("psnr[gloredy]", "did you mean 'gloredi'"),
        ("psnr", "no variant"),
        ("psnr[gloredi] - late", "share no seed"),
        ("nan", "finite"),
        ("mixed", "not both"),
        ("psnr[18] / (psnr[fbp] - 20)", "divides by zero"),
    ],
)
def test_faults_of_the_record_are_told(text, told):
    with pytest.raises(MetricError, match=told):
        values(text)
