"""SpaRe benchmark: every arm runs, seeds are paired, what is planned, and what is read from folders of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from common import params as parameters
from common.metrics.perceptual import MissingWeights
from papers.spare_benchmark import data, evaluation, experiment, figures, method
from papers.spare_benchmark.settings import Params


def tiny(**changes) -> Params:
    small = {"width": 32, "points": 100, "iterations": 12, "most": 150, "sh_degree": 0}
    return replace(parameters.load(Params, "spare_benchmark", "smoke"), **(small | changes))


@cache
def prepared() -> data.Prepared:
    found = data.prepare(tiny(), "generated", 3, "generated_00")
    return replace(found, sparse=found.cloud)  # stands in for structure from motion


@pytest.mark.parametrize("arm", experiment.ARMS)
def test_every_arm_trains_and_is_scored(arm):
    found = experiment.run(tiny(), arm, prepared(), 0)
    assert set(found["scores"]) == {"psnr", "ssim", "gmsd", "psnr_m", "ssim_m", "gmsd_m"}
    assert all(np.isfinite(list(found["scores"].values())))
    assert found["renders"].shape == (10, 24, 32, 3)
    assert found["renders"].dtype == torch.uint8
    expected = 7 if arm == "dngaussian" else 12  # DNGaussian's authors train 6,000 steps, the others 10,000
    assert len(found["losses"]) == expected
    assert found["gaussians"] <= (400 if experiment.ARMS[arm].sparse else 150)


def test_a_seed_fixes_a_run_and_another_changes_it():
    one, again, other = (experiment.run(tiny(), "dropgaussian", prepared(), seed) for seed in (0, 0, 1))
    assert one["scores"] == again["scores"]
    assert one["scores"] != other["scores"]


def test_the_plan_has_every_run_once():
    params = parameters.load(Params, "spare_benchmark", "laptop")
    plan = experiment.plan(params)
    assert len(plan) == len(set(plan))
    for set_ in params.dataset:
        for views in method.VIEW_COUNTS[set_]:
            assert {(arm, set_, views) for arm in params.arms} <= set(plan)
    assert ("fsgs_exact", "generated", 3) in plan
    assert ("fsgs_exact", "fern", 3) not in plan, "the truth of a photograph is not known"
    assert {arm for arm, set_, _ in plan if set_ == "fern_coarse"} == {"3dgs"}
    assert set(experiment.sets(params)) == {*params.dataset, "fern_coarse"}


def test_whole_seeds_come_first():
    params = tiny(seeds=[0, 1])
    ready = {("generated", views, "generated_00"): prepared() for views in (3, 9)}
    seeds = [int(key.rpartition("/")[2]) for key in experiment.jobs(params, ready)]
    assert seeds == sorted(seeds)
    assert len(seeds) == 2 * len(experiment.plan(params))


def test_lpips_without_weights_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(MissingWeights):
        experiment.perceptual(tiny(perceptual="lpips", lpips_weights=str(tmp_path)))


def test_a_prior_that_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="true depth"):
        experiment.run(tiny(), "fsgs_exact", replace(prepared(), exact=None), 0)
    with pytest.raises(ValueError, match="structure from motion"):
        experiment.run(tiny(), "3dgs_sfm", replace(prepared(), sparse=None), 0)


def test_random_backgrounds_only_where_photographs_are_filled():
    closed = experiment.train(tiny(), "corgs_neither", prepared(), 0)
    assert torch.equal(closed.background, torch.zeros(3))
    plain = experiment.train(tiny(), "3dgs", prepared(), 0)
    assert closed.losses == plain.losses, "a black box is black"
    opened = experiment.train(tiny(), "corgs_neither", replace(prepared(), random_background=True), 0)
    assert opened.losses != plain.losses


def test_the_timed_run_is_the_full_method_on_two_threads(monkeypatch):
    """On a stand-in for fern; what is measured is counted from training to scores."""
    asked, seen = [], {}

    def stands_in(params: Params, *address) -> data.Prepared:
        asked.append((params.factor_fern, *address))
        return prepared()

    def trained(params: Params, arm: str, *rest, honest=experiment.train):
        seen.update(threads=torch.get_num_threads(), arm=arm, params=params)
        return honest(params, arm, *rest)

    monkeypatch.setattr(data, "prepare", stands_in)
    monkeypatch.setattr(experiment, "train", trained)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = experiment.timing(tiny(timing_iterations=5, reset=False))
        assert torch.get_num_threads() == 1, "as it was"
    finally:
        torch.set_num_threads(before)
    assert asked == [(8, "fern", 3, "fern")]
    assert (seen["threads"], seen["arm"]) == (2, "3dgs")
    params = seen["params"]
    assert (params.iterations, params.sh_degree, params.reset, params.most) == (5, 3, True, 20_000)
    assert found["seconds"] > 0 and found["cpu_seconds"] > 0
    assert found["gaussians"] > 2 and np.isfinite(found["scores"]["psnr"])


# ----------------------------------------------------------------------------------------------------- conclusions


def test_spread_by_hand():
    runs = {"a": [1.0, 2.0, 3.0], "b": [5.0, 5.0, 8.0]}
    assert evaluation.pooled_deviation(runs) == pytest.approx(((1 + 3) / 2) ** 0.5)
    assert evaluation.resolvable(runs) == pytest.approx(1.96 * 2**0.5 * 2**0.5)
    with pytest.raises(ValueError, match="two seeds"):
        evaluation.pooled_deviation({"a": [1.0]})


def test_rank_swaps_by_hand():
    assert evaluation.rank_swaps({"a": 3, "b": 2, "c": 1}, {"a": 3, "b": 2, "c": 1}) == 0
    assert evaluation.rank_swaps({"a": 3, "b": 2, "c": 1}, {"a": 1, "b": 2, "c": 3}) == 3
    assert evaluation.rank_swaps({"a": 3, "b": 2, "c": 1}, {"a": 2, "b": 3, "c": 1}) == 1


def test_the_hardest_view_has_the_lowest_psnr():
    photographs = [torch.zeros(4, 4, 3)] * 3
    renders = torch.stack([torch.full((4, 4, 3), error) for error in (0.1, 0.3, 0.2)])
    assert evaluation.hardest(renders, photographs) == 1


def test_unseen_surface_is_less_with_more_views():
    few, many = (data.prepare(tiny(), "generated", views, "generated_00").scene for views in (3, 9))
    assert data.unseen_share("generated_00", many) < data.unseen_share("generated_00", few)


def test_figures_are_drawn():
    photograph = torch.rand(12, 16, 3)
    fig = figures.renders({"a": torch.rand(12, 16, 3), "b": photograph}, photograph)
    assert "inf" in fig.axes[1].get_title(loc="center")
    assert figures.short("cam_014_3_0000.png") == "cam_014"
    fig = figures.dots({"one": {"a": [1.0, 2.0]}, "two": {"a": [3.0]}}, "dB", zero=True)
    assert [axis.get_title() or axis.get_title(loc="left") for axis in fig.axes] == ["one", "two"]
    assert len(figures.against({"one": {"a": ([1.0], [2.0])}}, "x", "y").axes) == 1


# ---------------------------------------------------------------------------------------------- folders of one's own


def write_scene(root, name: str, indices, dataset: str) -> None:
    from PIL import Image

    from common.splatting.generated import object_rig
    from common.splatting.spare import image_name

    (root / name).mkdir(parents=True)
    place = root / ("dtu_calibration" if dataset == "DTU" else "synth_calibration")
    place.mkdir(exist_ok=True)
    rig, world = object_rig((64, 48)), data.generated_world("generated_00")
    for index in indices:
        image = (255 * world.render(rig[index], "x").image).to(torch.uint8).numpy()
        wide = Image.fromarray(image).resize((1600, 1200), Image.Resampling.NEAREST)
        wide.save(root / name / image_name(index, dataset))
        camera = rig[index].resized(1600, 1200)
        np.savetxt(place / f"pos_{index + 1:03d}.txt", (camera.K @ camera.viewmat[:3]).double().numpy())


def test_a_spare_folder_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SPARE_FACTOR", 25)
    root = tmp_path / "spare"
    write_scene(root, "Lamp", (22, 23, 15, 0), "SpaRe")
    split = {"Lamp": {"input_views": [22, 23, 15], "test_views": [0], "dataset": "SpaRe"}}
    (root / "Track1_split_train.json").write_text(json.dumps(split))
    params = tiny(data_dir=str(tmp_path))
    assert data.scene_names(params, "spare") == ["Lamp"]
    found = data.prepare(params, "spare", 3, "Lamp")
    assert len(found.scene.train) == 3
    assert len(found.cloud) > 100
    middle = found.cloud.positions.median(dim=0).values
    assert middle.norm() < 1, "points lie where the objects are"
    assert len(data.folder_hash(params, "spare")) == 64


def test_a_dtu_folder_is_prepared_with_masks(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(data, "DTU_FACTOR", 25)
    monkeypatch.setattr(method, "dtu", lambda views: data.splits.Split((22, 23, 15)[:views], (0,)))
    write_scene(tmp_path / "dtu", "scan8", (22, 23, 15, 0), "DTU")
    params = tiny(data_dir=str(tmp_path))
    with pytest.raises(data.MissingScenes, match="dtu_masks"):
        data.prepare(params, "dtu", 3, "scan8")
    (tmp_path / "dtu_masks" / "scan8").mkdir(parents=True)
    mask = np.zeros((1200, 1600), dtype=np.uint8)
    mask[:600] = 255
    Image.fromarray(mask).save(tmp_path / "dtu_masks" / "scan8" / "000.png")
    found = data.prepare(params, "dtu", 3, "scan8").scene.test[0]
    assert found.mask is not None
    assert found.mask[:24].min() == 1
    assert found.mask[24:].max() == 0


def test_missing_folders_are_named():
    for set_ in ("llff", "dtu", "spare"):
        with pytest.raises(data.MissingScenes, match=f"data_dir/{set_}"):
            data.prepare(tiny(), set_, 3, "fern")
    with pytest.raises(ValueError, match="no set"):
        data.prepare(tiny(), "moon", 3, "moon")
