"""The board: one row a claim and profile whatever is missing, the same file for the same results, and honest diffs."""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest
import toy_house
from rich.console import Console

from common import provenance, scoreboard
from common.claims import ClaimError
from common.params import PROFILES

house = toy_house.house
NO_PROCESS = 2**22 + 1  # above the kernel's largest process id


def verdicts(board, slug="toy", profile="smoke"):
    return {row.id: row.verdict for row in board.rows if (row.paper, row.profile) == (slug, profile)}


def test_there_is_a_row_for_each_claim_and_profile(house):
    board = scoreboard.collect(["toy", "other"], "smoke")
    ids = [claim.id for claim in board.entries[0].claims]
    expected = [(slug, name, profile) for slug in ("toy", "other") for name in ids for profile in PROFILES]
    assert [(row.paper, row.id, row.profile) for row in board.rows] == expected


def test_verdicts_come_from_the_files(house):
    board = scoreboard.collect(["toy"], "smoke")
    assert verdicts(board) == {
        "teacher-helps": "reproduced",
        "adjoint-exact": "reproduced",
        "psnr-18": "not tested",
        "psnr-18-small": "reproduced",
        "monotone": "inconclusive",
        "clamp-matters": "not tested",
    }
    row = board.entries[0].at("teacher-helps", "smoke")
    assert row.seeds == 3 and row.low is not None and row.run and row.device.startswith("cpu")


def test_a_missing_result_is_an_error_where_it_was_due_and_untested_elsewhere(house):
    smoke = scoreboard.collect(["other"], "smoke")
    assert set(verdicts(smoke, "other", "smoke").values()) == {"error", "not tested"}
    assert set(verdicts(smoke, "other", "laptop").values()) == {"not tested"}
    laptop = scoreboard.collect(["other"], "laptop")
    assert verdicts(laptop, "other", "laptop")["clamp-matters"] == "error"


@pytest.mark.parametrize(
    ("folder", "told"),
    [("scratch/failed/toy/laptop", "failed"), (f"scratch/running/toy/laptop-{NO_PROCESS}", "killed")],
)
def test_a_failed_or_killed_run_is_an_error_even_where_it_was_not_due(house, folder, told):
    (house / "results" / folder).mkdir(parents=True)
    row = scoreboard.collect(["toy"], "smoke").entries[0].at("clamp-matters", "laptop")
    assert row.verdict == "error" and told in row.reason


def test_a_run_that_is_still_going_is_no_error_yet(house):
    (house / f"results/scratch/running/toy/laptop-{os.getpid()}").mkdir(parents=True)
    row = scoreboard.collect(["toy"], "smoke").entries[0].at("clamp-matters", "laptop")
    assert row.verdict == "not tested"


def test_a_failed_run_does_not_hide_results_that_are_there(house):
    (house / "results/scratch/failed/toy/smoke").mkdir(parents=True)
    assert verdicts(scoreboard.collect(["toy"], "smoke"))["teacher-helps"] == "reproduced"


def test_a_broken_metrics_file_is_an_error_row_not_a_crash(house):
    (house / "results/metrics/toy/smoke.json").write_text('{"metrics": {')
    row = scoreboard.collect(["toy"], "smoke").entries[0].at("adjoint-exact", "smoke")
    assert row.verdict == "error" and "unreadable" in row.reason


def test_json_has_the_agreed_keys_and_only_the_results_decide_it(house):
    text = scoreboard.to_json(scoreboard.collect(["toy", "other"], "smoke"))
    content = json.loads(text)
    assert list(content) == ["claims", "built"]
    assert " ".join(content["claims"][0]) == (
        "paper id text kind claimed expect profile seeds measured low high verdict reason device run"
    )
    assert content["built"] == {"toy/smoke": {"run": "0c8f2f6d2b8a4e5f9a6b7c8d9e0f1a2b", "commit": "77f1bba"}}
    # measured here or restored, later or earlier: the file is the same
    provenance.remember(json.loads((house / "results/provenance/toy/smoke.json").read_text()))
    assert scoreboard.to_json(scoreboard.collect(["toy", "other"], "smoke")) == text


def test_the_headline_is_the_highest_measured_profile_with_lower_ones_beside_it(house):
    toy_house.write_results(house, "toy", "laptop", toy_house.metrics(-3.0))
    entry = scoreboard.collect(["toy"], "smoke").entries[0]
    assert (entry.headline("teacher-helps").profile, entry.headline("teacher-helps").verdict) == ("laptop", "refuted")
    assert [row.verdict for row in entry.lower("teacher-helps")] == ["reproduced"]
    assert entry.headline("psnr-18").profile == "paper"  # untested everywhere: at the profile it needs
    assert entry.lower("clamp-matters") == []


def test_results_of_one_profile_never_change_anothers_rows(house):
    before = verdicts(scoreboard.collect(["toy"], "smoke"))
    toy_house.write_results(house, "toy", "laptop", toy_house.metrics(-3.0))
    assert verdicts(scoreboard.collect(["toy"], "laptop")) == before


def test_a_stand_in_is_named_but_its_verdict_is_not_inherited(house):
    entry = scoreboard.collect(["toy"], "smoke").entries[0]
    row = entry.at("psnr-18", "paper")
    assert row.verdict == "not tested" and "psnr-18-small: reproduced at smoke" in row.reason


def test_markdown_keeps_every_claim_in_one_line_of_its_table(house):
    toy_house.write_results(house, "toy", "laptop", toy_house.metrics(-3.0))
    board = scoreboard.collect(["toy", "other"], "smoke")
    text = scoreboard.to_markdown(board)
    rows = [line for line in text.splitlines() if "<sub>" in line]
    assert len(rows) == 12
    assert all(line.replace("\\|", "").count("|") == 8 for line in rows)
    assert "&lt;with & without" in text and "stands in for psnr-18" in text
    assert "smoke: ✔ reproduced" in rows[0] and "✘ **refuted**" in rows[0]
    assert text == scoreboard.to_markdown(scoreboard.collect(["toy", "other"], "smoke"))


def test_diff_names_what_turned_appeared_and_went(house):
    before = json.loads(scoreboard.to_json(scoreboard.collect(["toy"], "smoke")))
    shutil.rmtree(house / "results")
    toy_house.write_results(house, "toy", "smoke", toy_house.metrics(-3.0))
    after = json.loads(scoreboard.to_json(scoreboard.collect(["toy"], "smoke")))
    changes = scoreboard.diff(before, after)
    assert scoreboard.Change("toy", "teacher-helps", "smoke", "reproduced", "refuted") in changes
    assert {change.id for change in changes} == {"teacher-helps", "psnr-18-small"}
    assert scoreboard.diff(after, after) == []
    assert scoreboard.diff({}, after)[0].before == "" and scoreboard.diff(after, {})[0].after == ""


def test_the_printed_table_shows_all_claims_errors_and_what_was_restored(house):
    out = io.StringIO()
    board = scoreboard.collect(["toy", "other"], "smoke")
    scoreboard.print_table(board, Console(file=out, width=80))
    text = out.getvalue()
    for row in board.entries[0].headlines:
        assert row.id in text and (
            row.verdict == "not tested" or f"{scoreboard.SIGNS[row.verdict]} {row.verdict}" in text
        )
    assert max(map(len, text.splitlines())) <= 80
    assert "smoke*" in text and "restored" in text
    assert text.count("error other at smoke: no measurement") == 1  # one missing run is one message
    assert "needs a run at laptop: clamp-matters" in text
    provenance.remember(json.loads((house / "results/provenance/toy/smoke.json").read_text()))
    assert scoreboard.collect(["toy"], "smoke").entries[0].restored == ()


def test_a_stub_is_refused_and_an_unmarked_empty_paper_is_an_error(house):
    (house / "papers/other/claims.yaml").write_text("")
    with pytest.raises(ClaimError, match="holds no claim"):
        scoreboard.collect(["toy", "other"], "smoke")
    (house / "papers/other/paper.yaml").write_text("title: Another Paper\nstub: true\n")
    board = scoreboard.collect(["toy", "other"], "smoke")
    assert "claim" in board.refused["other"] and {row.paper for row in board.rows} == {"toy"}
    assert "Refused: `other`" in scoreboard.to_markdown(board)
