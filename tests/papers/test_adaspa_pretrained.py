"""AdaSpa at the authors' scale, on a HunyuanVideo pipeline of a few thousand weights: text in, arms compared."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_hunyuan import write_hunyuan_video

from common import params as parameters
from common.models.stable_diffusion import MissingWeights
from papers.adaspa import evaluation, experiment
from papers.adaspa.settings import Params

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves


def test_arms_run_through_the_pipeline(tmp_path):
    params = dataclasses.replace(
        parameters.load(Params, "adaspa", "paper"),
        model=write_hunyuan_video(tmp_path / "hunyuan"),
        device="cpu",
        side=64,
        keep_ratio=0.1,
        frames=5,
        steps=4,
        search_steps=[2, 3],
        block_size=16,
        texts=["a cat", "waves"],
    )
    found = {arm: experiment.generate(params, arm, 0, None) for arm in ("dense", "adaspa", "svg")}
    dense = found["dense"]["videos"]
    assert dense.shape == (2, 3, 5, 64, 112) and dense.abs().max() <= 1
    assert not torch.equal(dense[0], dense[1])
    layers, prompts = 2, 2
    calls = {"dense": 1, "search": 2, "selection": 2, "sparse": 2}
    assert found["adaspa"]["calls"] == {name: count * layers * prompts for name, count in calls.items()}
    assert found["dense"]["density"] == 1.0 and found["svg"]["density"] < 1.0
    assert all(len(row["wall"]) == prompts and min(row["wall"]) > 0 for row in found.values())
    row = evaluation.arm_metrics(found["svg"]["videos"], dense, [], same=False)
    assert row["psnr"] > 10 and "follows" not in row


def test_missing_weights_are_named(tmp_path):
    params = dataclasses.replace(
        parameters.load(Params, "adaspa", "paper"), model=str(tmp_path / "nothing"), device="cpu"
    )
    with pytest.raises(MissingWeights, match="set model=FOLDER"):
        experiment.generate(params, "dense", 0, None)
