"""Assertions that the tests of several papers share.

A check that cannot fail proves nothing, so every claim has a *sabotage*: a one-line change of the method or the data
that must turn its verdict. A paper keeps them in `tests/papers/test_<slug>_sabotage.py`:

    SABOTAGE = {"teacher-helps": lambda: (metrics(), metrics(distill=0.0)), ...}

    @pytest.mark.parametrize("name", SABOTAGE)
    def test_sabotage_turns_the_verdict(name):
        assert_sabotage_turns(CLAIMS[name], *SABOTAGE[name]())
"""

from __future__ import annotations

from common import claims
from common.claims import Claim, Verdict
from common.expressions import Metrics


def assert_sabotage_turns(claim: Claim, honest_metrics: Metrics, sabotaged_metrics: Metrics) -> None:
    """Assert that the sabotaged metrics turn the verdict that the honest ones give.

    Reproduced must become refuted or inconclusive; refuted must become reproduced or inconclusive. Neither side may be
    an error: a metric that vanished says nothing about the claim. Metrics are `name -> variant -> seed or "all" ->
    value`, with as many seeds as the claim asks for.

    Raises:
        AssertionError: with both verdicts and their reasons.
    """
    honest, sabotaged = _judge(claim, honest_metrics), _judge(claim, sabotaged_metrics)
    story = f"claim {claim.id!r}\n  honest:    {_told(honest)}\n  sabotaged: {_told(sabotaged)}"
    if honest.verdict not in (claims.REPRODUCED, claims.REFUTED):
        raise AssertionError(f"the honest metrics decide nothing, so no sabotage can turn them: {story}")
    if sabotaged.verdict == claims.ERROR:
        raise AssertionError(f"the sabotage broke the measurement instead of changing it: {story}")
    if sabotaged.verdict == honest.verdict:
        raise AssertionError(f"the sabotage went unnoticed, so the check does not bite: {story}")


def _judge(claim: Claim, metrics: Metrics) -> Verdict:
    """Judge as if the run met the claim's needs: the sabotage tests the check, not the machine."""
    met = {"device": claim.needs.device, "data": list(claim.needs.data)}
    return claims.judge(claim, metrics, met, claim.needs.profile)


def _told(verdict: Verdict) -> str:
    return f"{verdict.verdict}: {verdict.reason}"
