"""SR-STE's arms: names, paired seeds, what is sparse, what is measured; and ImageNet's folder in small."""

from __future__ import annotations

import dataclasses
import pickle
from functools import cache

import pytest
import torch
from PIL import Image

from common import params as parameters
from common.data import images
from common.data.images import ImageSet
from papers.sr_ste import data, experiment
from papers.sr_ste.settings import Params, parse


def tiny(**changes) -> Params:
    small = {"steps": 8, "batch": 16, "validation": 0, "sweep": [10.0], "by_position": ["2:4"], "repeats": 2}
    return dataclasses.replace(parameters.load(Params, "sr_ste", "smoke"), **(small | changes))


def squares(count: int, seed: int) -> ImageSet:
    """Grey noise with a bright quarter whose place is the class."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(100, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    for image, label in zip(pixels, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 100
    return ImageSet("squares", pixels, labels, tuple("abcd"))


@pytest.fixture(autouse=True)
def no_files(monkeypatch):
    """Generated pictures in place of the digits: these tests are about the arms."""
    monkeypatch.setattr(images, "digits", lambda split: squares(200 if split == "train" else 80, int(split == "test")))


@cache
def fitted(name: str, seed: int = 0) -> dict:
    params = tiny()
    return experiment.fit(params, experiment.arms(params)[name], data.load(params), seed)


# --------------------------------------------------------------------------------------------------------------- arms


def test_arms_are_named_by_recipe_pattern_and_multiple_of_the_decay():
    params = tiny(sr_ste=["2:4", "1:8"], ste=["1:8"], sweep=[0.1, 10.0], decay=0.02)
    found = experiment.arms(params)
    assert list(found) == [
        "dense",
        "sr_ste/2:4",
        "sr_ste/1:8",
        "ste/1:8",
        "by_position/2:4",
        "sr_ste/1:8x0.1",
        "sr_ste/1:8x10",
    ]
    assert found["sr_ste/1:8x10"].decay == pytest.approx(0.2)
    assert [experiment.swept(params, x) for x in (0, 1, 10)] == ["ste/1:8", "sr_ste/1:8", "sr_ste/1:8x10"]


def test_the_paper_profile_trains_a_second_network_in_some_arms():
    params = parameters.load(Params, "sr_ste", "paper")
    found = experiment.arms(params)
    assert found["resnet18/sr_ste/2:4"] == dataclasses.replace(found["sr_ste/2:4"], network="resnet18")
    assert found["sr_ste/2:4"].network == "resnet50"
    assert found["sr_ste/2:4"].decay == 2e-4


def test_resnet20_is_the_published_one_and_leaves_its_narrow_stage_dense_at_1_32():
    params = parameters.load(Params, "sr_ste", "laptop")
    network, handle = experiment.build(params, experiment.Arm("resnet20", "sr_ste", "1:32"), classes=10, channels=3)
    assert sum(weight.numel() for weight in network.parameters()) == 269_722
    assert len(handle.layers) == 11, "of 19 convolutions those with at least 32 input channels"


def test_every_claim_of_the_laptop_profile_has_its_arms():
    from common import claims, paths

    recorded = set(experiment.arms(parameters.load(Params, "sr_ste", "laptop")))
    for claim in claims.load(paths.paper("sr_ste") / "claims.yaml"):
        if claim.needs.profile == "laptop" and claim.kind != "speed":
            assert {variant for _, variant in claim.metric.metrics} <= recorded, claim.id


@pytest.mark.parametrize("pattern", ["2", "4:2", "0:4", "2:4:8"])
def test_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(ValueError, match="n:m"):
        parse(pattern)
    with pytest.raises(ValueError, match="n:m"):
        tiny(ste=["1:8", pattern])


def test_a_sweep_without_its_ends_is_refused():
    with pytest.raises(ValueError, match="sweep_pattern is '2:4'"):
        tiny(sweep_pattern="2:4")


def test_stem_and_head_stay_dense_and_all_else_is_sparse():
    for profile, sparse in (("laptop", 6), ("paper", 52)):  # ResNet-50: 53 convolutions
        params = dataclasses.replace(parameters.load(Params, "sr_ste", profile), device="cpu")
        arm = experiment.arms(params)["sr_ste/1:8"]
        _, handle = experiment.build(params, arm, classes=10, channels=3)
        assert len(handle.layers) == sparse
        assert sorted(handle.skipped) == (["head", "stem"] if profile == "laptop" else ["conv1", "fc"])


def test_every_pattern_fits_every_sparse_layer_of_the_laptop_network():
    params = parameters.load(Params, "sr_ste", "laptop")
    layers = {
        name: len(experiment.build(params, arm, classes=10, channels=3)[1].layers)
        for name, arm in experiment.arms(params).items()
    }
    assert layers.pop("sr_ste/1:32") == 3, "32 does not divide the 16 channels of the first stage"
    assert all(count == (18 if name.startswith("resnet20/") else 6) for name, count in layers.items())
    assert experiment.partly_dense(params, classes=10, channels=3) == {"sr_ste/1:32"}, "as the figure's star says"


# ----------------------------------------------------------------------------------------------------------- training


def test_a_seed_fixes_a_training_and_another_changes_it():
    first, again, other = fitted("sr_ste/1:8"), fitted.__wrapped__("sr_ste/1:8"), fitted("sr_ste/1:8", seed=1)
    for result in (first, again, other):
        result.pop("seconds", None)
    assert first == again
    assert first["curves"] != other["curves"]


def test_arms_of_a_seed_start_from_the_same_weights_and_images():
    """The first loss of two sparse arms of one pattern is the same: only the second step can differ."""
    losses = [fitted(name)["curves"]["loss"][0] for name in ("ste/1:8", "sr_ste/1:8", "sr_ste/1:8x10")]
    assert losses[0] == losses[1] == losses[2]
    assert fitted("dense")["curves"]["loss"][0] != losses[0]


def test_what_is_measured_is_what_it_says():
    found = fitted("ste/1:8")
    assert found["violations"] == 0
    assert [step for step, _ in found["curves"]["sad"]] == list(range(1, 9))
    assert found["sad"] == found["curves"]["sad"][-1][1]
    assert found["flips"] == pytest.approx(sum(value for _, value in found["curves"]["flip_rate"]))
    assert found["sad"] <= found["flips"]
    assert 0 <= found["top1"] <= 100
    assert "top1_validation" not in found
    assert fitted("by_position/2:4")["violations"] == 0


def test_training_learns():
    params = tiny(steps=60)
    result = experiment.fit(params, experiment.arms(params)["sr_ste/2:4"], data.load(params), 0)
    assert result["top1"] > 90


def test_violations_see_a_group_that_keeps_too_many():
    params = tiny()
    _, handle = experiment.build(params, experiment.arms(params)["sr_ste/1:8"], classes=4, channels=1)
    assert experiment.violations(handle) == 0
    layer = next(iter(handle.layers.values()))
    layer.kept[0, :8, 0, 0] = True
    assert experiment.violations(handle) == 1


def test_long_rows_are_thinned_and_keep_their_last_value():
    points = experiment._thinned(list(range(1000)))
    assert len(points) == 100
    assert points[-1] == (1000, 999)
    assert experiment._thinned([5.0]) == [(1, 5.0)]


def test_steps_are_timed_in_turns():
    params = tiny()
    found = experiment.seconds_per_step(params, data.load(params))
    assert {name: len(row) for name, row in found.items()} == {"plain": 2, "ste": 2, "sr_ste": 2}
    assert all(value > 0 for row in found.values() for value in row)


# --------------------------------------------------------------------------------------------------------------- data


def test_held_out_images_are_in_no_training_batch_and_seeds_share_them():
    loaded = data.load(tiny(validation=40))
    assert len(loaded) == 160
    held = torch.cat([labels for _, labels in loaded.held_out("validation")])
    assert held.bincount().tolist() == [10] * 4
    assert torch.equal(loaded.validation.pixels, data.load(tiny(validation=40)).validation.pixels)
    assert not list(data.load(tiny()).held_out("validation"))
    result = experiment.fit(tiny(validation=40), experiment.arms(tiny())["dense"], loaded, 0)
    assert 0 <= result["top1_validation"] <= 100


def test_batches_are_the_seeds_and_augmentation_moves_them():
    plain, moved = data.load(tiny()), data.load(tiny(augment=True))
    first, again = (next(plain.batches(16, 1, 0)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    other = next(moved.batches(16, 1, 0))
    assert torch.equal(first[1], other[1]) and not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], next(plain.batches(16, 1, 1))[1])


def test_data_travels_to_a_worker():
    copied = pickle.loads(pickle.dumps(data.load(tiny())))
    assert torch.equal(next(copied.batches(4, 1, 0))[0], next(data.load(tiny()).batches(4, 1, 0))[0])


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for name, colour in (("n01", (200, 30, 30)), ("n02", (30, 30, 200))):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (40, 36), colour).save(tmp_path / split / name / f"{index}.JPEG")
    return tmp_path


def imagenet(folder, **changes) -> Params:
    small = {"data_dir": str(folder), "device": "cpu", "size": 32, "batch": 3, "steps": 2, "loaders": 0, "epochs": 0}
    return dataclasses.replace(parameters.load(Params, "sr_ste", "paper"), **(small | changes))


def test_the_paper_profile_trains_on_a_folder(folder):
    params = imagenet(folder)
    loaded = data.load(params)
    assert (loaded.name, loaded.classes, len(loaded)) == ("imagenet", 2, 6)
    result = experiment.fit(params, experiment.arms(params)["resnet18/sr_ste/2:4"], loaded, 0)
    assert result["violations"] == 0
    assert len(result["curves"]["loss"]) == 2
    assert experiment.steps_of(dataclasses.replace(params, steps=0, epochs=5), loaded) == 10


def test_a_folder_gives_the_same_images_for_a_seed_and_goes_round(folder):
    loaded = data.load(imagenet(folder))
    labels = [torch.cat([y for _, y in loaded.batches(3, 4, 0)]).tolist() for _ in range(2)]
    assert labels[0] == labels[1]
    assert sorted(labels[0][:6]) == [0, 0, 0, 1, 1, 1], "a pass sees every image"
    assert sum(len(y) for _, y in loaded.held_out("test")) == 6


def test_folders_that_cannot_serve_say_why(folder):
    with pytest.raises(FileNotFoundError, match="train"):
        data.load(imagenet(folder / "nowhere"))
    (folder / "val" / "n03").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "val" / "n03" / "0.JPEG")
    with pytest.raises(ValueError, match=r"2 classes in train/ and 3 in val/"):
        data.load(imagenet(folder))
    with pytest.raises(ValueError, match="needs none"):
        data.load(tiny(data_dir="somewhere"))
    (folder / "val" / "n03" / "0.JPEG").unlink()
    (folder / "val" / "n03").rmdir()
    with pytest.raises(ValueError, match="batch=7 of 6"):
        next(data.load(imagenet(folder)).batches(7, 1, 0))
