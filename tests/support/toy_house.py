"""A small house with two papers and fabricated results, for tests of the board and its pages; nothing is measured.

A test module takes the fixture with `house = toy_house.house`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CLAIMS = """
- id: teacher-helps
  text: The teacher that sees twice the views helps the student at 18 views, at equal size and equal training.
  source: {table: 4, row: 2}
  kind: order
  metric: psnr[teacher] - psnr[plain]
  claimed: "0.9"
  expect: "> 0"
  tolerance: {abs: 0.3, why: another data set and a fifth of the steps}
  needs: {profile: smoke}
  seeds: 3
- id: adjoint-exact
  text: Back-projection is the exact adjoint of projection.
  source: ours
  kind: invariant
  metric: adjoint_error
  expect: "< 1e-6"
  needs: {profile: smoke}
  seeds: 0
- id: psnr-18
  text: At 18 views the method reaches 34.75 dB on AAPM slices.
  source: {table: 1}
  kind: value
  metric: psnr[teacher]
  claimed: "34.75"
  tolerance: {abs: 0.1, why: five runs of the authors}
  needs: {profile: paper, device: cuda, data: [aapm]}
  seeds: 3
- id: psnr-18-small
  text: At 18 views the method reaches 27 dB on phantoms of 64 by 64 pixels.
  source: ours
  kind: value
  metric: psnr[teacher]
  expect: "26..28"
  needs: {profile: smoke}
  seeds: 3
  proxy_of: psnr-18
  scale: 64 px phantoms instead of 256 px slices, 1200 steps
- id: monotone
  text: More views never hurt <with & without> the teacher | at any seed.
  source: {figure: 6}
  kind: trend
  metric: increasing(views[18], views[36], views[72])
  claimed: monotone
  expect: "> 0"
  needs: {profile: smoke}
  seeds: 3
- id: clamp-matters
  text: Without the clamp on the loss, training is worse.
  source: {section: "4.3"}
  kind: order
  metric: psnr[plain] - psnr[no_clamp]
  claimed: improves the training
  expect: "> 0"
  needs: {profile: laptop}
  seeds: 3
"""

PAPER = """
title: "Learning to Distill: a Toy Paper of Some Length for Tests of the Page's Layout"
authors: A. Author, B. Author
venue: Nowhere 2023
arxiv: "2301.00001"
summary: A teacher that sees twice the views teaches a student that sees half of them.
code:
  url: https://example.org/code/that/has/a/rather/long/address/which-must-not-widen-the-page-on-a-phone
  commit: 0123456789abcdef0123456789abcdef01234567
  licence: none
hardware: 4x RTX 3090
deviations:
  - Phantoms instead of patients at the smoke profile.
  - {what: The loss is clamped where the text says so, paper: "clamped at 0.5", here: both behind a switch, why: code}
"""


def metrics(shift: float = 0.0) -> dict[str, Any]:
    """Fabricated values for three seeds; `shift` moves the teacher."""
    seeds = {"0": 0.0, "1": 0.35, "2": 0.6}
    return {
        "psnr": {
            "teacher": {seed: 26.8 + shift + 0.2 * value for seed, value in seeds.items()},
            "plain": {seed: 26.0 + 0.35 * value for seed, value in seeds.items()},
            "no_clamp": {seed: 26.01 + 0.1 * value for seed, value in seeds.items()},
        },
        "views": {
            "18": {seed: 24 + value for seed, value in seeds.items()},
            "36": {seed: 24.3 + 0.1 * value for seed, value in seeds.items()},
            "72": {seed: 29 + value for seed, value in seeds.items()},
        },
        "adjoint_error": {"": {"all": 3.2e-7}},
    }


def write_results(root: Path, slug: str, profile: str, values: dict[str, Any]) -> None:
    """The official files of one execution, as the driver writes them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    results = root / "results"
    origin = {
        "paper": slug,
        "profile": profile,
        "run": "0c8f2f6d2b8a4e5f9a6b7c8d9e0f1a2b",
        "device": "cpu: Fabricated Processor 9000",
        "data": {"phantoms": "ab12"},
        "git": {"commit": "77f1bba0123456789", "dirty": False},
        "environment": {"python": "3.11.7", "torch": "2.15.0"},
        "machine": {"system": "Linux x86_64", "cores": 2, "ram_gb": 24.0},
        "started": "2026-11-20T10:00:00.000000+00:00",
        "finished": "2026-11-20T10:00:42.000000+00:00",
        "seconds": 42.0,
    }
    document = {"paper": slug, "profile": profile, "params": {"seeds": [0, 1, 2]}, "metrics": values}
    for folder, content in (("metrics", document), ("provenance", origin)):
        path = results / folder / slug / f"{profile}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    figures = results / "figures" / slug / profile
    figures.mkdir(parents=True)
    captions = {}
    for name, width in (("reconstructions", 9), ("curves", 6)):
        figure = Figure(figsize=(width, 4), layout="constrained")
        figure.add_subplot().plot([1, 3, 2])
        figure.savefig(figures / f"{name}.png", dpi=110)
        captions[name] = f"A fabricated figure called {name}: it shows three numbers & nothing else."
    (figures / "figures.json").write_text(json.dumps(captions))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a house with the papers `toy` (measured at smoke) and `other` (never run); it becomes the cwd."""
    for slug in ("toy", "other"):
        folder = tmp_path / "papers" / slug
        folder.mkdir(parents=True)
        (folder / "claims.yaml").write_text(CLAIMS)
        (folder / "paper.yaml").write_text(PAPER if slug == "toy" else "title: Another Paper")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text("papers: [toy, other]\nprofile: smoke\n")
    write_results(tmp_path, "toy", "smoke", metrics())
    monkeypatch.chdir(tmp_path)
    return tmp_path
