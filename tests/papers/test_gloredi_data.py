"""GloReDi's data: loaders on tiny made-up folders, splits that do not leak, the triple, and noise."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from common import data as datasets
from common import params as parameters
from papers.gloredi import data
from papers.gloredi.settings import Params


def settings(**changes) -> Params:
    tiny = {"size": 16, "train_images": 3, "test_images": 2, "full_views": 36, "views": [9], "main_views": 9}
    return dataclasses.replace(parameters.load(Params, "gloredi", "smoke"), **(tiny | changes))


@pytest.fixture
def deeplesion(tmp_path):
    for index in range(4):
        folder = tmp_path / "Images_png" / f"00000{index}_01_01"
        folder.mkdir(parents=True)
        stored = np.full((32, 32), 32768 + 100 * index, dtype=np.uint16)
        stored[0, 0], stored[0, 1] = 0, 65535  # far outside the clip
        Image.fromarray(stored).save(folder / "001.png")
    names = [f"Images_png/00000{index}_01_01/001.png" for index in range(4)]
    (tmp_path / "deeplesion_train_list.txt").write_text("\n".join(names[:3]) + "\n")
    (tmp_path / "deeplesion_test_list.txt").write_text(names[3] + "\n")
    return tmp_path


def test_deeplesion_png_becomes_attenuation_by_the_authors_offset_and_clip(deeplesion):
    params = settings(dataset="deeplesion", data_dir=str(deeplesion), size=32, train_images=0, test_images=0)
    training, test = data.slices(params, "train"), data.slices(params, "test")
    assert (len(training), len(test)) == (3, 1)
    hu = data.mu_to_hu(test[0])
    assert hu[5, 5].item() == pytest.approx(300, abs=0.01)
    assert hu[0, 0].item() == pytest.approx(-1000, abs=0.01)  # clipped to -1024 HU, then no negative attenuation
    assert hu[0, 1].item() == pytest.approx(3072, abs=0.01)


def test_deeplesion_without_lists_or_images_says_what_is_missing(deeplesion):
    params = settings(dataset="deeplesion", data_dir=str(deeplesion), train_images=0)
    (deeplesion / "Images_png/000001_01_01/001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images .*000001_01_01"):
        data.slices(params, "train")
    (deeplesion / "deeplesion_train_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"deeplesion_train_list\.txt is missing"):
        data.slices(params, "train")


def test_aapm_takes_the_first_for_training_and_the_last_for_testing(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "AAPM_SPLIT", {"train": 3, "test": 2})
    for index in range(6):
        np.save(tmp_path / f"L{index:03d}.npy", np.full((32, 32), 10 * index, dtype=np.int16))
    params = settings(dataset="aapm", data_dir=str(tmp_path), train_images=0, test_images=0)
    values = {
        split: [round(data.mu_to_hu(x).mean().item()) for x in data.slices(params, split)]
        for split in ("train", "test")
    }
    assert values == {"train": [0, 10, 20], "test": [40, 50]}
    assert data.slices(params, "train")[0].shape == (16, 16)
    (tmp_path / "L000.npy").unlink()
    (tmp_path / "L001.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds 4 \.npy files; expected at least 5"):
        data.slices(params, "train")


@pytest.mark.parametrize("dataset", ["deeplesion", "aapm"])
def test_missing_data_is_one_clear_error(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"expected the folder of the {dataset} images.*--set data_dir="):
        data.slices(settings(dataset=dataset, data_dir=str(tmp_path / "nowhere")), "train")


def test_a_superfluous_data_dir_is_refused():
    with pytest.raises(ValueError, match="which needs none"):
        data.slices(settings(data_dir="somewhere"), "train")


def test_phantom_splits_share_no_slice_and_more_of_them_extend_the_set():
    training, test = data.slices(settings(), "train"), data.slices(settings(), "test")
    assert not any(torch.equal(a, b) for a in training for b in test)
    assert torch.equal(data.slices(settings(train_images=4), "train")[0], training[0])


def test_head_slices_are_head_like_and_split_by_position():
    if datasets.locate("ct_phantom_head_philips", only="bone_1mm_256.npz") is None:
        pytest.skip("ct_phantom_head_philips is not here: set RESPARSE_DATA_MIRROR to a folder that has it")
    params = settings(dataset="head_philips", size=64, train_images=0, test_images=0)
    training, test = data.slices(params, "train"), data.slices(params, "test")
    assert (len(training), len(test)) == (104, 28)
    for image in (training[0], test[0]):
        assert image.shape == (64, 64)
        assert image.min() >= 0 and 0.2 < image.max() < 0.7  # bone, in 1/cm


def test_head_split_keeps_a_gap():
    used = set(range(140)) - set(range(data.HEAD_TEST.start - data.HEAD_GAP, data.HEAD_TEST.stop + data.HEAD_GAP))
    assert min(abs(a - b) for a in used for b in data.HEAD_TEST) > data.HEAD_GAP


def test_attenuation_and_hu_are_inverse_above_air():
    hu = torch.tensor([-1000.0, 0, 1000, 2000])
    assert data.hu_to_mu(hu).tolist() == pytest.approx([0, 0.192, 0.384, 0.576])
    torch.testing.assert_close(data.mu_to_hu(data.hu_to_mu(hu)), hu)


def test_triple_gets_closer_to_the_target_with_more_views():
    params = settings(size=32, full_views=144, views=[9], main_views=9)
    triple = data.TripleSet(params, "test").batch([0, 1], 9)
    assert all(x.shape == (2, 1, 32, 32) for x in triple)
    far, near = ((x - triple.target).square().mean().item() for x in triple[:2])
    assert 0 < near < far
    whole = data.Simulator(32, 144)
    mu = data.TripleSet(params, "test").source([0])
    torch.testing.assert_close(whole.images(mu, [], torch.Generator())[144], triple.target[:1])


def test_views_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"expected a divisor.*12"):
        data.Simulator(16, 36).subset(torch.zeros(1, 1, 36, 8), 10)


def test_noise_falls_with_photons_and_leaves_the_target_alone():
    errors = []
    clean = data.TripleSet(settings(size=32), "test").batch([0], 9)
    for photons in (1e3, 1e5):
        noisy = data.TripleSet(settings(size=32, noise_photons=photons), "test").batch([0], 9)
        torch.testing.assert_close(noisy.target, clean.target)
        errors.append((noisy.sparse - clean.sparse).std().item())
    assert errors[0] == pytest.approx(10 * errors[1], rel=0.3)  # Poisson: 1 / sqrt(photons)


def test_augmented_copies_keep_the_mass_of_a_centred_object():
    image = torch.zeros(1, 33, 33)
    image[0, 12:21, 12:21] = 0.2
    image[0, 8:12, 12:16] = 0.1
    turned = data.augment(image, 3, torch.Generator().manual_seed(0))
    assert len(turned) == 4
    assert not torch.allclose(turned[1], turned[2], atol=0.01)
    for copy in turned:
        assert copy.sum().item() == pytest.approx(image.sum().item(), rel=0.02)


def test_every_image_is_seen_once_a_pass_and_seeds_differ():
    order = list(data.batches(5, 2, 5, seed=0))
    assert sorted(itertools.chain(*order[:2], order[2][:1])) == [0, 1, 2, 3, 4]
    assert order == list(data.batches(5, 2, 5, seed=0))
    assert order != list(data.batches(5, 2, 5, seed=1))
