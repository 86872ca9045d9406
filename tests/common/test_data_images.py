"""Images: splits, augmentation by hand-made pictures, folders made here, and a teacher whose mask is known."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from common.data import images
from common.data.images import ImageSet
from common.data.planted import planted


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(count: int = 40, classes: int = 4, size: int = 8) -> ImageSet:
    """Image i has the value i in every pixel and the label i modulo the classes."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, size, size).clone()
    return ImageSet("toy", pixels, torch.arange(count) % classes, tuple("abcdefghij"[:classes]))


# --------------------------------------------------------------------------------------------------------------- sets


def test_cifar_is_whole_shuffled_and_looks_like_cifar(real_data):
    real_data(images.CIFAR10)
    train, test = images.cifar10("train"), images.cifar10("test")
    assert train.pixels.shape == (12_000, 3, 32, 32) and test.pixels.shape == (10_000, 3, 32, 32)
    assert train.labels.bincount().tolist() == [1200] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert len(set(train.labels[:100].tolist())) == 10, "the file is sorted by class; the set must not be"
    moments = torch.tensor([0.493, 0.483, 0.447])  # SOURCE.md of the set
    torch.testing.assert_close(train.pixels.float().mean(dim=(0, 2, 3)) / 255, moments, atol=2e-3, rtol=0)
    frogs = train.pixels[train.labels == 6].float().mean(dim=(0, 2, 3))
    ships = train.pixels[train.labels == 8].float().mean(dim=(0, 2, 3))
    assert ships[2] > frogs[2] + 20, "ships are on blue water: labels stayed with their images"


def test_digits_are_split_without_overlap_and_fill_the_grey_range():
    train, test = images.digits("train"), images.digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.pixels.shape[1:] == (1, 8, 8)
    assert (train.pixels.min(), train.pixels.max()) == (0, 240)
    seen = {bytes(image.flatten().tolist()) for image in train.pixels}
    assert sum(bytes(image.flatten().tolist()) in seen for image in test.pixels) == 0


def test_held_out_images_are_balanced_and_gone_from_the_rest():
    rest, held = toy().hold_out(8, seed=0)
    assert held.labels.bincount().tolist() == [2] * 4
    values = [set(part.pixels[:, 0, 0, 0].tolist()) for part in (rest, held)]
    assert values[0] | values[1] == set(range(40)) and not values[0] & values[1]
    assert torch.equal(held.pixels[:, 0, 0, 0] % 4, held.labels)
    again, other = toy().hold_out(8, seed=0)[1], toy().hold_out(8, seed=1)[1]
    assert torch.equal(again.pixels, held.pixels) and not torch.equal(other.pixels, held.pixels)


@pytest.mark.parametrize("count", [0, 6, 40])
def test_a_split_that_cannot_be_balanced_is_refused(count):
    with pytest.raises(ValueError, match="multiple of 4 classes"):
        toy().hold_out(count, seed=0)


def test_shrinking_averages_areas():
    pixels = torch.tensor([[0, 100, 8, 8], [100, 200, 8, 8]], dtype=torch.uint8).repeat(2, 1)[None, None]
    small = ImageSet("x", pixels, torch.zeros(1, dtype=torch.long), ("a",)).shrunk(2)
    assert small.pixels[0, 0].tolist() == [[100, 8], [100, 8]]
    with pytest.raises(ValueError, match="divisor"):
        toy().shrunk(3)


def test_standardised_images_have_mean_zero_and_variance_one_in_each_channel():
    pixels = torch.randint(256, (50, 3, 4, 4), generator=generator(), dtype=torch.uint8)
    pixels[:, 1] //= 4
    image_set = ImageSet("x", pixels, torch.zeros(50, dtype=torch.long), ("a",))
    x = images.Standardiser(image_set)(pixels)
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(dim=(0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)


# ------------------------------------------------------------------------------------------------------ augmentation


def test_augmented_images_are_cut_from_the_padded_one_or_its_mirror():
    picture = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    padded = torch.nn.functional.pad(picture, (2, 2, 2, 2))
    crops = [padded[..., i : i + 5, j : j + 5] for i in range(5) for j in range(5)]
    allowed = {bytes(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(3))}
    made = images.crop_and_flip(picture.expand(600, -1, -1, -1), generator(), padding=2)
    seen = {bytes(image.flatten().tolist()) for image in made}
    assert len(allowed) == 50 and seen == allowed  # 600 draws of 50: one is missed with a chance of 3e-4, fixed by seed


def test_augmentation_keeps_channels_together_and_follows_its_generator():
    picture = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).repeat(8, 3, 1, 1)
    made = images.crop_and_flip(picture, generator(), padding=1)
    assert torch.equal(made[:, 0], made[:, 2])
    assert torch.equal(made, images.crop_and_flip(picture, generator(), padding=1))
    assert not torch.equal(made, images.crop_and_flip(picture, generator(1), padding=1))


def test_every_pass_visits_each_image_once_at_most_in_a_new_order():
    drawn = list(images.shuffled_batches(10, 3, 6, generator()))
    first, second = torch.cat(drawn[:3]).tolist(), torch.cat(drawn[3:]).tolist()
    assert len(set(first)) == len(set(second)) == 9
    assert first != second
    with pytest.raises(ValueError, match="batch <= 10"):
        next(images.shuffled_batches(10, 11, 1, generator()))


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_of_classes_is_read_as_imagenet_is(tmp_path):
    for split in ("train", "val"):
        for name, colour in (("n01", (255, 0, 0)), ("n02", (0, 0, 255))):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (40, 30), colour).save(tmp_path / split / name / f"{index}.JPEG")
    for split in ("train", "val"):
        found = images.image_folder(tmp_path, split, size=16)
        assert found.classes == ["n01", "n02"] and len(found) == 4
        image, label = found[3]
        assert image.shape == (3, 16, 16) and label == 1
        blue = (1 - images.IMAGENET_MEAN[2]) / images.IMAGENET_STD[2]
        torch.testing.assert_close(image[2], torch.full((16, 16), blue), atol=0.05, rtol=0)


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"<root>/train/<class>"):
        images.image_folder(tmp_path, "train")


# ------------------------------------------------------------------------------------------------------------ teacher


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 16), (3, 8)])
def test_the_teacher_is_exactly_n_of_m_and_explains_its_targets(n, m):
    data = planted(n, m, inputs=64, outputs=24, samples=2000, seed=0, noise=0.1)
    assert (data.weight.view(24, -1, m) != 0).sum(-1).eq(n).all()
    assert torch.equal(data.weight != 0, data.mask)
    residual = data.targets - data.inputs @ data.weight.T
    assert residual.std().item() == pytest.approx(0.1, rel=0.05)
    assert data.targets.var().item() == pytest.approx(13 / 12 + 0.01, rel=0.25)  # E size² = 13/12; 24 random rows


def test_recovery_is_one_for_the_right_mask_and_a_matter_of_chance_for_another():
    data = planted(2, 8, inputs=512, outputs=64, samples=1, seed=0)
    assert data.recovered(data.mask) == 1
    other = planted(2, 8, inputs=512, outputs=64, samples=1, seed=1).mask
    assert data.recovered(other) == pytest.approx(0.25, abs=0.02)  # 8192 places: standard error 0.005


def test_inputs_are_correlated_within_groups_as_asked():
    x = planted(1, 4, inputs=8, outputs=1, samples=20_000, seed=0, correlation=0.6).inputs
    found = torch.corrcoef(x.T)
    expected = torch.block_diag(*[torch.full((4, 4), 0.6)] * 2).fill_diagonal_(1.0)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="multiples of m"):
        planted(1, 4, inputs=6, outputs=1, samples=1, seed=0)
