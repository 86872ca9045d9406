"""Claims: the file's schema and its errors, what printed numbers and expectations mean, and every verdict."""

from __future__ import annotations

import math

import pytest

from common import claims
from common.claims import Band, ClaimError
from common.testing import assert_sabotage_turns

ENTRY = {
    "id": "teacher-helps",
    "text": "The teacher helps.",
    "source": "{table: 4}",
    "kind": "order",
    "metric": "psnr[teacher] - psnr[plain]",
    "claimed": '"1.3"',
    "expect": '"> 0"',
    "needs": "{profile: smoke}",
    "seeds": "3",
}


def write(folder, *entries):
    """Entries as YAML text; a value of None drops the key."""
    text = ""
    for change in entries:
        fields = {key: value for key, value in (ENTRY | change).items() if value is not None}
        text += "- " + "\n  ".join(f"{key}: {value}" for key, value in fields.items()) + "\n"
    path = folder / "toy" / "claims.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def claim(tmp_path):
    def make(**change):
        return claims.load(write(tmp_path, change))[0]

    return make


def seeded(*values):
    """Metrics whose paired differences are `values`; the arms themselves vary much more."""
    teacher = {str(seed): 30.0 + 5 * seed + value for seed, value in enumerate(values)}
    return {"psnr": {"teacher": teacher, "plain": {str(seed): 30.0 + 5 * seed for seed in range(len(values))}}}


def fixed(value):
    return {"error": {"": {"all": value}}}


# ---- the file


def test_a_full_entry_is_read_as_written(tmp_path):
    full = {"needs": "{profile: paper, device: cuda, data: [a, b]}", "tolerance": "{abs: 0.5, why: their spread}"}
    small = {"id": "small", "proxy_of": "teacher-helps", "scale": "64 px phantoms"}
    first, second = claims.load(write(tmp_path, full, small))
    assert (first.paper, first.source, first.seeds) == ("toy", "table 4", 3)
    assert first.needs == claims.Needs("paper", "cuda", ("a", "b"))
    assert first.tolerance == claims.Tolerance(0.5, False, "their spread")
    assert (second.proxy_of, second.scale) == ("teacher-helps", "64 px phantoms")
    assert first.metric.metrics == (("psnr", "teacher"), ("psnr", "plain"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "ordr"}, r"claims.yaml:4: claim 'teacher-helps'.*did you mean 'order'"),
        ({"expct": '"> 1"'}, r"unknown key 'expct'; did you mean 'expect'"),
        ({"metric": None}, "lacks metric"),
        ({"metric": "psnr["}, r"claims.yaml:5.*metric: cannot read"),
        ({"claimed": "1.30"}, r"claims.yaml:6.*in quotes"),
        ({"claimed": None}, "lacks claimed"),
        ({"expect": '"positive"'}, r"claims.yaml:7.*expect: got 'positive'"),
        ({"expect": '"3..1"'}, "swap the ends"),
        ({"expect": None}, "only kind: value"),
        ({"expect": None, "kind": "value", "claimed": "about the same"}, "expected a printed number"),
        ({"text": '""'}, "text is empty"),
        ({"id": "Teacher_Helps"}, "kebab-case"),
        ({"seeds": "1"}, "one seed never decides"),
        ({"seeds": "true"}, "seeds got True"),
        ({"kind": "speed", "seeds": "0"}, "timings vary"),
        ({"needs": "{profile: lap}"}, "did you mean 'laptop'"),
        ({"needs": "{profile: smoke, device: tpu}"}, "cpu or cuda"),
        ({"needs": "{profile: smoke, data: 3}"}, "registered name"),
        ({"needs": "smoke"}, "expected a mapping"),
        ({"tolerance": "{abs: 0.1}"}, "lacks why"),
        ({"tolerance": "{abs: 0.1, rel: 0.1, why: x}"}, "exactly one"),
        ({"tolerance": "{abs: -1, why: x}"}, "above 0"),
        ({"tolerance": "{abs: 1, why: x}", "claimed": "better"}, "a sign is not softened"),
        ({"proxy_of": "teacher-help", "scale": "x"}, "another claim of this file"),
    ],
)
def test_a_broken_entry_is_told_with_its_line(tmp_path, change, told):
    with pytest.raises(ClaimError, match=told):
        claims.load(write(tmp_path, change))


def test_faults_between_entries_are_told(tmp_path):
    with pytest.raises(ClaimError, match="second time"):
        claims.load(write(tmp_path, {}, {}))
    with pytest.raises(ClaimError, match="without scale"):
        claims.load(write(tmp_path, {}, {"id": "b", "proxy_of": "teacher-helps"}))
    with pytest.raises(ClaimError, match="needs no more"):
        claims.load(write(tmp_path, {}, {"id": "b", "proxy_of": "teacher-helps", "scale": "x"}))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        ("", "holds no claim"),
        ("id: x", "expected a list"),
        ("- just words", "claims.yaml:1"),
        ("- id: a\n  expect: > 0\n", "not YAML"),
        ("- {id: a, id: b}", "not YAML"),
    ],
)
def test_a_file_that_is_no_list_of_claims_is_told(tmp_path, content, told):
    path = tmp_path / "claims.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ClaimError, match=told):
        claims.load(path)


# ---- what numbers mean


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("34.75", 34.745, 34.755),
        ("1.3", 1.25, 1.35),
        ("-0.50 dB", -0.505, -0.495),
        ("−2", -2.5, -1.5),
        ("93.8 %", 93.75, 93.85),
        ("2.64e-3", 2.635e-3, 2.645e-3),
        ("14.54x", 14.535, 14.545),
    ],
)
def test_a_printed_number_is_an_interval_of_half_its_last_digit(text, low, high):
    band = claims.printed_interval(text)
    assert band is not None
    assert (band.low, band.high) == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize("text", ["each helps", "up to 2.64", "1.2.3", "1.3 ± 0.1", "30 to 40", "1,234", ""])
def test_what_is_no_printed_number_is_not_taken_for_one(text):
    assert claims.printed_interval(text) is None


@pytest.mark.parametrize(
    ("text", "inside", "outside", "across"),
    [
        ("> 0", (0.1, 2), (-1, 0), (0, 1)),
        (">= 0", (0, 2), (-1, -0.1), (-1, 0)),
        ("< 1e-6", (0, 9e-7), (1e-6, 1), (0, 1e-6)),
        ("<= 1", (0, 1), (1.1, 2), (1, 2)),
        ("= 4", (4, 4), (4.1, 5), (3, 5)),
        ("29.5..30.5", (29.5, 30.5), (31, 32), (30, 31)),
    ],
)
def test_an_expectation_holds_its_border_as_written(text, inside, outside, across):
    band = claims.expectation(text)
    assert band.contains(*inside) and not band.excludes(*inside)
    assert band.excludes(*outside) and not band.contains(*outside)
    assert not band.contains(*across) and not band.excludes(*across)
    assert claims.expectation(str(band)) == band


def test_tolerance_widens_a_printed_value(claim):
    value = {"kind": "value", "expect": None, "claimed": '"34.75"'}
    assert claim(**value).band == Band(34.745, 34.755)
    wide = claim(**value, tolerance="{rel: 0.1, why: other data}").band
    assert (wide.low, wide.high) == pytest.approx((34.745 - 3.475, 34.755 + 3.475))


def test_tolerance_never_softens_a_sign(claim):
    tolerant = claim(tolerance="{abs: 0.5, why: their spread}")
    assert claims.judge(tolerant, seeded(-0.2, -0.21, -0.19), {}, "smoke").verdict == "refuted"


# ---- verdicts


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((1.0, 1.1, 1.2), "reproduced"),
        ((-1.0, -1.1, -1.2), "refuted"),
        ((1.0, -1.0, 0.3), "inconclusive"),
        ((0.0, 0.0, 0.0), "refuted"),
    ],
)
def test_the_interval_of_paired_differences_decides(claim, differences, verdict):
    got = claims.judge(claim(), seeded(*differences), {"device": "cpu", "run": "r1"}, "smoke")
    assert got.verdict == verdict
    assert (got.seeds, got.device, got.run, got.profile) == (3, "cpu", "r1", "smoke")
    assert got.measured == pytest.approx(sum(differences) / 3)
    assert got.low is not None and got.high is not None and got.low <= got.measured <= got.high


def test_unpaired_arms_would_not_have_decided(claim):
    """The arms spread over 10 dB, their differences over 0.2: pairing is what makes three seeds enough."""
    arms = claim(metric="psnr[teacher] - 30")
    assert claims.judge(arms, seeded(1.0, 1.1, 1.2), {}, "smoke").verdict == "inconclusive"


def test_one_seed_never_decides_however_clear(claim):
    for difference in (50.0, -50.0):
        got = claims.judge(claim(), seeded(difference), {}, "smoke")
        assert (got.verdict, got.low, got.high) == ("inconclusive", None, None)
        assert "one seed" in got.reason and got.measured == pytest.approx(difference)


def test_fewer_seeds_than_asked_for_do_not_decide(claim):
    got = claims.judge(claim(seeds="5"), seeded(1.0, 1.1, 1.2), {}, "smoke")
    assert got.verdict == "inconclusive" and "3 of the 5 seeds" in got.reason


def test_seeds_that_one_arm_lacks_are_named(claim):
    metrics = seeded(1.0, 1.1, 1.2, 1.3)
    del metrics["psnr"]["plain"]["3"]
    got = claims.judge(claim(), metrics, {}, "smoke")
    assert got.verdict == "reproduced" and "without seeds 3" in got.reason


def test_the_printed_size_is_reported_beside_a_sign(claim):
    assert "size agrees" in claims.judge(claim(), seeded(1.299, 1.3, 1.301), {}, "smoke").reason
    assert "size differs" in claims.judge(claim(), seeded(0.5, 0.51, 0.52), {}, "smoke").reason
    assert "may or may not" in claims.judge(claim(), seeded(1.0, 1.1, 1.3), {}, "smoke").reason


def test_deterministic_claims_compare_their_value(claim):
    exact = claim(kind="invariant", metric="error", expect='"< 1e-6"', claimed='"small"', seeds="0")
    assert claims.judge(exact, fixed(2e-7), {}, "smoke").verdict == "reproduced"
    assert claims.judge(exact, fixed(1e-6), {}, "smoke").verdict == "refuted"


def test_seeding_must_be_as_the_claim_says(claim):
    exact = claim(kind="invariant", metric="error", expect='"< 1e-6"', seeds="0")
    seeds = {"error": {"": {"0": 1e-9, "1": 1e-9}}}
    assert "seeds: 0" in claims.judge(exact, seeds, {}, "smoke").reason
    stochastic = claim(metric="error")
    got = claims.judge(stochastic, fixed(1.0), {}, "smoke")
    assert got.verdict == "error" and "without any" in got.reason


def test_a_value_is_reproduced_only_by_an_interval_inside_its_band(claim):
    value = claim(kind="value", expect=None, metric="psnr[teacher]", tolerance="{abs: 0.05, why: rounding}")
    near = {"psnr": {"teacher": {"0": 1.29, "1": 1.3, "2": 1.31}}}
    assert claims.judge(value, near, {}, "smoke").verdict == "reproduced"
    wide = {"psnr": {"teacher": {"0": 1.0, "1": 1.3, "2": 1.6}}}
    assert claims.judge(value, wide, {}, "smoke").verdict == "inconclusive"


def test_needs_that_are_not_met_are_not_tested_and_say_how(claim):
    big = claim(needs="{profile: laptop, device: cuda, data: [head]}")
    good = seeded(1.0, 1.1, 1.2)
    low = claims.judge(big, good, {"device": "cuda", "data": ["head"]}, "smoke")
    assert low.verdict == "not tested" and "resparse run toy --profile laptop" in low.reason
    cpu = claims.judge(big, good, {"device": "cpu", "data": ["head"]}, "laptop")
    assert cpu.verdict == "not tested" and "cuda" in cpu.reason
    other = claims.judge(big, good, {"device": "cuda:0", "data": {"phantoms": "ab"}}, "laptop")
    assert other.verdict == "not tested" and "head" in other.reason and "phantoms" in other.reason
    assert claims.judge(big, good, {"device": "cuda:0", "data": {"head": "ab"}}, "paper").verdict == "reproduced"


def test_a_missing_measurement_is_an_error_only_where_it_was_due(claim):
    due = claims.judge(claim(), None, None, "smoke")
    assert due.verdict == "error" and "resparse run toy --profile smoke" in due.reason
    assert claims.judge(claim(), None, None, "laptop", due=False).verdict == "not tested"
    for status in ("the run failed", "the run is unfinished"):
        dead = claims.judge(claim(), None, {"status": status}, "laptop", due=False)
        assert dead.verdict == "error" and status in dead.reason


def test_a_record_that_cannot_answer_is_an_error(claim):
    got = claims.judge(claim(), {"pnsr": {}}, {}, "smoke")
    assert got.verdict == "error" and "did you mean 'pnsr'" in got.reason
    diverged = claims.judge(claim(), seeded(1.0, math.nan, 1.0), {}, "smoke")
    assert diverged.verdict == "error" and "finite" in diverged.reason


def test_an_unknown_profile_is_refused(claim):
    with pytest.raises(ValueError, match="did you mean 'laptop'"):
        claims.judge(claim(), None, None, "laptp")


# ---- sabotage


def test_a_sabotage_must_turn_the_verdict_either_way(claim):
    good, bad, vague = seeded(1.0, 1.1, 1.2), seeded(-1.0, -1.1, -1.2), seeded(1.0, -1.0, 0.0)
    assert_sabotage_turns(claim(), good, bad)
    assert_sabotage_turns(claim(), bad, vague)
    assert_sabotage_turns(claim(needs="{profile: paper, device: cuda, data: x}"), good, bad)
    with pytest.raises(AssertionError, match="unnoticed"):
        assert_sabotage_turns(claim(), good, seeded(0.5, 0.6, 0.7))
    with pytest.raises(AssertionError, match="decide nothing"):
        assert_sabotage_turns(claim(), vague, bad)
    with pytest.raises(AssertionError, match="broke the measurement"):
        assert_sabotage_turns(claim(), good, {})
