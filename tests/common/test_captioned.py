"""Captioned images: the generated shapes, CIFAR-10 at 16 pixels, the styles, and the words of captions."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import _store, captioned, images
from common.data.captioned import LENGTH, NOTHING, SHAPES, VOCABULARY, style_set, tokens
from common.data.shapes import RADIUS, shapes
from common.data.styles import STYLES, stylised


def luma(image: Tensor) -> Tensor:
    """[N, 3, H, W] in -1..1 -> grey values [N, H W]."""
    return torch.einsum("nchw,c->nhw", image, image.new_tensor((0.299, 0.587, 0.114))).flatten(1)


# ------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_images_of_their_captions():
    found = shapes(400, seed=3)
    assert found.images.shape == (400, 3, 16, 16) and found.images.dtype == torch.float32
    assert found.images.min() >= -1 and found.images.max() <= 1
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])  # red, green, blue, yellow
    area = torch.empty(400)
    for i, image in enumerate(found.images):
        inside = image.amax(0) > 0  # the ground is dark
        area[i] = inside.sum()
        paint = (image[:, inside].mean(1) + 1) / 2
        nearest = F.cosine_similarity(paint - paint.min(), colours, dim=1).argmax()
        assert SHAPES["colour"][nearest] == found.captions[i].split()[1]
    size, _, shape = found.content.unbind(1)
    filled = [RADIUS["large"] ** 2 * share for share in (3.14, 3.10, 1.62, 2.26)]  # of circle, square, triangle, cross
    for kind, expected in enumerate(filled):
        large = area[(shape == kind) & (size == 1)].mean()
        assert large == pytest.approx(expected, rel=0.12), SHAPES["shape"][kind]  # a rim of half-covered pixels
        assert area[(shape == kind) & (size == 0)].mean() < 0.5 * large


def test_shapes_stay_inside_and_use_all_attributes_evenly():
    found = shapes(2000, seed=0)
    rim = torch.cat([found.images[..., 0], found.images[..., -1], found.images[..., 0, :], found.images[..., -1, :]], 2)
    assert (rim < 0).all()  # the ground, all around
    for attribute, words in enumerate(SHAPES.values()):
        counts = found.content[:, attribute].bincount(minlength=len(words))
        # five standard deviations of a binomial count
        assert ((counts - 2000 / len(words)).abs() < 5 * (2000 / len(words)) ** 0.5).all()


def test_shapes_repeat_by_seed_and_differ_between_seeds():
    first, again, other = shapes(50, seed=1), shapes(50, seed=1), shapes(50, seed=2)
    assert torch.equal(first.images, again.images) and first.captions == again.captions
    distance = (first.images[:, None] - other.images).abs().amax((2, 3, 4))
    assert distance.min() > 0.01  # no image of one is in the other
    assert len(shapes(0, seed=0)) == 0
    with pytest.raises(ValueError, match="count=-1"):
        shapes(-1, seed=0)


# ------------------------------------------------------------------------------------------------------------- styles


@pytest.mark.parametrize("style", STYLES)
def test_a_style_keeps_the_range_and_repeats(style: str):
    plain = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = plain.clone()
    found = stylised(plain, style)
    assert found.shape == plain.shape and torch.equal(plain, before)
    assert found.min() >= -1 and found.max() <= 1 and torch.equal(found, stylised(plain, style))
    one_by_one = torch.cat([stylised(image[None], style) for image in plain])
    torch.testing.assert_close(found, one_by_one)  # an image's style does not depend on its neighbours
    # at another size it looks alike: the same picture, four times as large
    large = stylised(plain.repeat_interleave(4, 2).repeat_interleave(4, 3), style)
    assert F.mse_loss(F.avg_pool2d(large, 4), found) < 0.02
    assert stylised(plain.double(), style).dtype == torch.float64 and stylised(plain[:0], style).shape[0] == 0


def test_styles_differ_from_each_other_and_from_plain_images():
    """Mean colours and textures alone tell five of six apart, on images of equal content."""
    plain = shapes(300, seed=0).images
    looks = {"": plain} | {style: stylised(plain, style) for style in STYLES}
    for (one, first), (two, second) in itertools.combinations(looks.items(), 2):
        assert F.mse_loss(first, second) > 0.03, (one, two)  # of a range of 2; noise that eyes see has 0.003
    means = torch.stack([look.mean((0, 2, 3)) for look in looks.values()])
    assert torch.pdist(means).min() > 0.1


@pytest.mark.parametrize("style", STYLES)
def test_a_style_keeps_what_is_shown(style: str):
    """The brightness, up to its sign, is still that of the plain image: outlines stay."""
    plain = shapes(200, seed=0)
    before, after = luma(plain.images), luma(stylised(plain.images, style))
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(before, after, strict=True)])
    assert correlation.abs().median() > 0.5


def test_styles_refuse_what_is_no_image():
    with pytest.raises(ValueError, match="expected one of barbie"):
        stylised(torch.zeros(1, 3, 16, 16), "baroque")
    with pytest.raises(TypeError, match="floats"):
        stylised(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "barbie")
    for shape in ((3, 16, 16), (1, 1, 16, 16), (1, 3, 2, 16)):
        with pytest.raises(ValueError, match="of at least 4 x 4"):
            stylised(torch.zeros(shape), "barbie")


# ----------------------------------------------------------------------------------------------------------- captions


def test_captions_become_words_and_back():
    found = shapes(20, seed=0).in_style("hornify")
    rows = tokens(found.captions)
    assert rows.shape == (20, LENGTH) and rows.dtype == torch.int64
    back = [" ".join(VOCABULARY[word] for word in row) for row in rows.tolist()]
    assert back == [caption.replace(",", "") for caption in found.captions]
    assert found.captions[0].startswith("hornify style, ")
    assert tokens([NOTHING]).tolist() == [[0] * LENGTH] and tokens([]).shape == (0, LENGTH)
    assert len(set(VOCABULARY)) == len(VOCABULARY) and set(STYLES) < set(VOCABULARY)


def test_captions_that_cannot_be_read_say_why():
    with pytest.raises(ValueError, match="'brabie' in 'brabie style, frog'; did you mean 'barbie'"):
        tokens(["frog", "brabie style, frog"])
    with pytest.raises(ValueError, match="6 words"):
        tokens(["barbie style small red small circle"])


# --------------------------------------------------------------------------------------------------------- style sets


@pytest.mark.parametrize(("style", "count"), [("barbie", 316), ("elementfire", 156)])
def test_a_style_set_has_the_papers_size_and_shares_nothing_with_what_is_held_out(style: str, count: int):
    pool = shapes(700, seed=5)
    train, held = style_set(style, pool, held_out=300)
    assert (len(train), len(held), train.style) == (count, 300, style)
    assert (train.images[:, None] - held.images).abs().amax((2, 3, 4)).min() > 0
    plain = stylised(pool.images, style)
    for part in (train, held):
        where = [int((plain - image).abs().amax((1, 2, 3)).argmin()) for image in part.images[:20]]
        torch.testing.assert_close(plain[where], part.images[:20])
        assert torch.equal(pool.content[where], part.content[:20])
    again, _ = style_set(style, pool, held_out=300)
    other, _ = style_set(style, pool, held_out=300, seed=1)
    assert torch.equal(train.images, again.images) and not torch.equal(train.images, other.images)


def test_style_sets_that_cannot_be():
    with pytest.raises(ValueError, match="at least 456 in the pool"):
        style_set("elementfire", shapes(400, seed=0), held_out=300)
    with pytest.raises(ValueError, match="expected one of"):
        style_set("baroque", shapes(400, seed=0))
    with pytest.raises(ValueError, match="already"):
        shapes(3, seed=0).in_style("barbie").in_style("hornify")


def test_cifar10_is_shrunk_and_captioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a file of its own in the registered layout: twenty flat images whose grey value says the class."""
    from PIL import Image

    folder, coded = tmp_path / images.CIFAR10, []
    folder.mkdir()
    for label in range(20):
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), (10 * (label % 10),) * 3).save(stream, "JPEG")
        coded.append(np.frombuffer(stream.getvalue(), dtype=np.uint8))
    offsets = np.cumsum([0, *map(len, coded)])
    np.savez(folder / "test.npz", jpeg_bytes=np.concatenate(coded), offsets=offsets, labels=np.arange(20) % 10)
    monkeypatch.setattr(_store, "path", lambda name, only=None: folder)
    found = captioned.cifar10("test")
    assert found.images.shape == (20, 3, 16, 16) and sorted(set(found.captions)) == sorted(images.CIFAR10_CLASSES)
    expected = (10 * found.content[:, 0]).float() / 127.5 - 1
    torch.testing.assert_close(found.images.mean((1, 2, 3)), expected, atol=0.02, rtol=0)  # what JPEG loses
