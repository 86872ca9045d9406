"""Every claim against the results in this repository: what is committed must be able to answer what is claimed.

That each claims.yaml is valid, with unique ids and a sabotage for every claim, is checked in test_paper.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common import claims, paper
from common.claims import Claim
from common.expressions import MetricError
from common.params import PROFILES

ROOT = Path(__file__).resolve().parents[2]
FEWEST_CLAIMS = 10  # a paper that is no stub says enough to be judged by


def papers() -> list[str]:
    found = sorted(path.parent.name for path in (ROOT / "papers").glob("*/claims.yaml"))
    return [slug for slug in found if not paper.load(ROOT / "papers" / slug / "paper.yaml").stub]


def claims_of(slug: str) -> list[Claim]:
    return claims.load(ROOT / "papers" / slug / "claims.yaml")


@pytest.fixture(params=papers())
def slug(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("profile", PROFILES)
def test_committed_results_answer_every_claim_they_are_meant_for(slug: str, profile: str) -> None:
    results = ROOT / "results" / "metrics" / slug / f"{profile}.json"
    if not results.is_file():
        pytest.skip(f"results/metrics/{slug}/{profile}.json is not there: {slug} has not been run at {profile}")
    metrics = json.loads(results.read_text())["metrics"]
    meant = [claim for claim in claims_of(slug) if PROFILES.index(claim.needs.profile) <= PROFILES.index(profile)]
    unanswered = []
    for claim in meant:
        try:
            measured = claim.metric.evaluate(metrics)
        except MetricError as error:
            unanswered.append(f"{claim.id}: {error}")
        else:
            assert bool(measured.seeds) == (claim.seeds > 0), f"{claim.id}: seeds: {claim.seeds}, got {measured.seeds}"
    assert not unanswered, f"{len(unanswered)} of {len(meant)} claims: {unanswered}"


def test_the_board_agrees_with_the_claims(slug: str) -> None:
    """scoreboard.json is committed: it must have been built from these claims, one row for each at each profile."""
    board = ROOT / "scoreboard.json"
    if not board.is_file():
        pytest.skip("scoreboard.json is not there: run `make repro`")
    rows = [row for row in json.loads(board.read_text())["claims"] if row["paper"] == slug]
    expected = [(claim.id, profile, claim.text) for claim in claims_of(slug) for profile in PROFILES]
    assert [(row["id"], row["profile"], row["text"]) for row in rows] == expected, "run `dvc repro -s scoreboard`"


def test_a_paper_claims_enough_and_something_at_smoke(slug: str) -> None:
    found = claims_of(slug)
    assert len(found) >= FEWEST_CLAIMS
    assert any(claim.needs.profile == "smoke" for claim in found), "a newcomer's run must be able to test something"
    assert any(claim.source != "ours" for claim in found), "some claim must be the authors'"
