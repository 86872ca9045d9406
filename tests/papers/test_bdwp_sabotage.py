"""Sabotages of `bdwp`: a one-line change of method or data that must turn the verdict of each claim."""

from __future__ import annotations

import pytest

from common import claims, paths
from common.testing import assert_sabotage_turns

# claim id -> () -> (honest metrics, sabotaged metrics); common/testing.py shows one
SABOTAGE = {}


@pytest.mark.parametrize("claim_id", sorted(SABOTAGE))
def test_sabotage_turns_the_verdict(claim_id: str) -> None:
    found = {claim.id: claim for claim in claims.load(paths.paper("bdwp") / "claims.yaml")}
    assert_sabotage_turns(found[claim_id], *SABOTAGE[claim_id]())
