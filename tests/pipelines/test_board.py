"""The board's command: what it writes, prints and returns, and its one-line errors."""

from __future__ import annotations

import json
import subprocess

import pytest
import toy_house

from pipelines import board

house = toy_house.house


def commit(house):
    for command in (
        ["git", "init", "-q"],
        ["git", "add", "."],
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "one"],
    ):
        subprocess.run(command, cwd=house, check=True)


def test_a_refuted_claim_breaks_nothing_and_an_error_does(house, capsys):
    (house / "params.yaml").write_text("papers: [toy]\nprofile: smoke\n")
    toy_house.write_results(house, "toy", "laptop", toy_house.metrics(-3.0))
    assert board.main([]) == 0
    assert "refuted" in capsys.readouterr().out
    (house / "params.yaml").write_text("papers: [toy, other]\nprofile: smoke\n")
    assert board.main([]) == 1
    message = capsys.readouterr().err
    assert "error: other at smoke: no measurement" in message and "adjoint-exact" in message


def test_everything_is_written_and_unchanged_results_write_the_same(house):
    board.main(["--table"])
    written = ["scoreboard.json", "SCOREBOARD.md", "results/site/index.html", "results/site/toy.html"]
    first = {name: (house / name).read_bytes() for name in written}
    board.main([])
    assert {name: (house / name).read_bytes() for name in written} == first
    assert len(json.loads(first["scoreboard.json"])["claims"]) == 36


def test_a_page_of_a_paper_that_left_goes_too(house):
    board.main([])
    (house / "params.yaml").write_text("papers: [toy]\nprofile: smoke\n")
    board.main([])
    assert sorted(path.name for path in (house / "results/site").iterdir()) == ["index.html", "toy.html"]


def test_diff_against_a_commit(house, capsys):
    board.main([])
    commit(house)
    board.main(["--diff", "HEAD"])
    assert "no verdict differs from HEAD" in capsys.readouterr().out
    claims = house / "papers/toy/claims.yaml"
    claims.write_text(claims.read_text().replace('expect: "26..28"', 'expect: "30..31"'))
    board.main(["--diff", "HEAD"])
    assert "toy psnr-18-small at smoke: reproduced -> refuted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("papers: [toyy]\nprofile: smoke\n", "did you mean 'toy'"),
        ("profile: smoke\n", "a list `papers:`"),
        ("papers: [toy]\nprofile: smok\n", "did you mean 'smoke'"),
        ("papers: [toy\n", "not valid YAML"),
    ],
)
def test_settings_that_cannot_be_are_one_line(house, capsys, settings, told):
    (house / "params.yaml").write_text(settings)
    assert board.main([]) == 2
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1


def test_a_commit_without_a_board_is_one_line(house, capsys):
    commit(house)
    assert board.main(["--diff", "HEAD"]) == 2
    assert "no board in commit 'HEAD'" in capsys.readouterr().err


def test_a_broken_claim_stops_the_board_with_its_line(house, capsys):
    claims = house / "papers/toy/claims.yaml"
    claims.write_text(claims.read_text().replace("kind: trend", "kind: trnd"))
    assert board.main([]) == 2
    assert "did you mean 'trend'" in capsys.readouterr().err
