"""Models that draw captions: shapes and conditions, guidance, sampling, and that a short training is worth it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.data.captioned import LENGTH, STYLES, VOCABULARY
from common.models.diffusion import Schedule, epsilon_loss
from common.models.text_to_image import TextToImage, guided, noise_loss, sample
from common.training import text_to_image as training

KINDS = {"unet": {"width": 16, "depth": 2}, "dit": {"width": 32, "depth": 1}}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(kind: str) -> TextToImage:
    torch.manual_seed(0)
    return TextToImage(kind, **KINDS[kind]).eval()


class Echo:
    """Predicts the mean of its text, whatever it is shown, and remembers how often it is asked."""

    def __init__(self) -> None:
        self.schedule, self.asked = Schedule.cosine(), []

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.asked.append(text)
        return torch.zeros_like(x) + text.mean((1, 2))[:, None, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        return latents


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("kind", KINDS)
def test_a_core_is_diffusers_own_and_all_that_is_trained(kind: str):
    import diffusers

    model = small(kind)
    wanted = {"unet": diffusers.UNet2DConditionModel, "dit": diffusers.PixArtTransformer2DModel}[kind]
    assert isinstance(model.core, wanted)
    assert all(name.startswith("core.") for name, _ in model.named_parameters())
    x, t = torch.randn(3, 3, 16, 16, generator=draw()), torch.tensor([1, 500, 1000])
    text = model.encode_text(["small red circle", "barbie style, frog", ""])
    assert text.shape[:2] == (3, LENGTH)
    noise = model(x, t, text)
    assert noise.shape == x.shape
    torch.testing.assert_close(noise[1:2], model(x[1:2], t[1:2], text[1:2]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x, t, text[:1]), model(x, t, text[:1].expand(3, -1, -1)))
    assert torch.equal(model.encode(x), x) and model.decode(9 * x).abs().max() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_depends_on_image_time_and_every_word(kind: str):
    model = small(kind)
    x, t = torch.randn(1, 3, 16, 16, generator=draw()), torch.tensor([300])
    base = model(x, t, model.encode_text(["barbie style, small red circle"]))

    @torch.no_grad()
    def changed(x: Tensor, t: Tensor, caption: str) -> float:
        return float((model(x, t, model.encode_text([caption])) - base).abs().max())

    caption = "barbie style, small red circle"
    assert changed(x, t, caption) == 0
    for other in ("hornify style, small red circle", "barbie style, large red circle", "barbie style, small red cross"):
        assert changed(x, t, other) > 1e-5
    assert changed(x + 0.1, t, caption) > 1e-3 and changed(x, t + 300, caption) > 1e-3
    corner = x.clone()
    corner[..., 0, 0] += 1
    moved = (model(corner, t, model.encode_text([caption])) - base).abs().amax((0, 1))
    assert (moved > 0).all()  # attention carries it everywhere


def test_words_that_no_training_shows_have_vectors_like_the_others():
    """And they stay as they are: those of a model are drawn by its seed, the core's weights by torch's generator."""
    model, other = small("dit"), TextToImage("dit", seed=1, **KINDS["dit"])
    size = model.table.norm(dim=1)
    new = torch.tensor([VOCABULARY.index(style) for style in STYLES])
    assert (size[new] > size.min() * 0.9).all() and size.min() > 4  # 64 normal numbers: 8, give or take 0.7
    likeness = torch.nn.functional.normalize(model.table, dim=1) @ torch.nn.functional.normalize(model.table, dim=1).T
    assert (likeness - torch.eye(len(VOCABULARY))).abs().max() < 0.6  # five standard deviations of 1 / 8
    assert torch.equal(model.table, small("unet").table) and not torch.equal(model.table, other.table)
    assert {"table", "places"} <= model.state_dict().keys()


def test_sizes_that_make_no_network_are_refused():
    for kind, sizes, message in (
        ("unet", {"width": 20, "depth": 2}, "multiple of 16"),
        ("unet", {"width": 16, "depth": 2, "size": 9}, "halved"),
        ("dit", {"width": 48, "depth": 1}, "multiple of 32"),
        ("dit", {"width": 32, "depth": 1, "size": 15}, "even number"),
        ("gan", {"width": 32, "depth": 1}, "expected one of unet, dit"),
    ):
        with pytest.raises(ValueError, match=message):
            TextToImage(kind, **sizes)


# ------------------------------------------------------------------------------------------------- loss and guidance


def test_guidance_goes_on_from_nothing_through_the_caption():
    model, x, t = small("unet"), torch.randn(2, 3, 16, 16, generator=draw()), torch.tensor([100, 700])
    text, nothing = model.encode_text(["small red circle", "frog"]), model.encode_text([""])
    without, told = model(x, t, nothing), model(x, t, text)
    for scale in (0.0, 1.0, 3.0):
        expected = without + scale * (told - without)
        torch.testing.assert_close(guided(model, text, nothing, scale)(x, t), expected, atol=1e-5, rtol=1e-4)
    echo = Echo()
    guided(echo, text, nothing, 1.0)(x, t)
    assert len(echo.asked) == 1 and len(echo.asked[0]) == 2  # one pass, no second half


def test_a_share_of_the_captions_is_left_out():
    echo, latents = Echo(), torch.zeros(2000, 3, 2, 2)
    text, nothing = torch.ones(2000, 5, 4), torch.zeros(1, 5, 4)
    noise_loss(echo, latents, text, nothing, draw(), drop=0.1)
    left_out = int((echo.asked[0].sum((1, 2)) == 0).sum())
    assert abs(left_out - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5  # five standard deviations of the count
    assert ((echo.asked[0] == 0).all((1, 2)) | (echo.asked[0] == 1).all((1, 2))).all()
    for drop, mean in ((0.0, 1.0), (1.0, 0.0)):
        noise_loss(echo, latents, text, nothing, draw(), drop=drop)
        assert echo.asked[-1].mean() == mean


# ------------------------------------------------------------------------------------------------------------ sampling


def test_samples_do_not_depend_on_the_batch_and_repeat_by_the_generator():
    model = small("dit")
    text, nothing = model.encode_text(["red circle", "frog", "large blue cross"]), model.encode_text([""])
    found = sample(model, text, nothing, steps=3, generator=draw())
    assert found.shape == (3, 3, 16, 16) and found.abs().max() <= 1 and found.std() > 0.01
    torch.testing.assert_close(
        sample(model, text, nothing, steps=3, generator=draw(), batch=2), found, atol=1e-4, rtol=0
    )
    assert not torch.equal(sample(model, text, nothing, steps=3, generator=draw(1)), found)
    one = sample(model, text[:1], nothing, steps=3, generator=draw())
    torch.testing.assert_close(one, found[:1], atol=1e-4, rtol=0)
    for bad in ({"batch": 0}, {"text": text[:0]}):
        with pytest.raises(ValueError, match="at least one of each"):
            sample(model, bad.pop("text", text), nothing, steps=3, generator=draw(), **bad)


def test_latents_go_unlimited_through_the_models_decoder():
    class Loud(Echo):
        def decode(self, latents: Tensor) -> Tensor:
            return torch.full_like(latents[:, :1], latents.shape[1])

    found = sample(
        Loud(), torch.zeros(2, 5, 4), torch.zeros(1, 5, 4), steps=2, generator=draw(), shape=(4, 8, 8), limit=None
    )
    assert found.shape == (2, 1, 8, 8) and (found == 4).all()


# ------------------------------------------------------------------------------------------------------- pre-training


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_training_predicts_noise_better_under_the_right_caption(kind: str):
    recipe = replace(training.RECIPES[f"diffusion-shapes-{kind}"], **KINDS[kind], steps=50, batch=8, rate=4e-3, ema=0.9)
    trained = training.train(recipe)
    model = trained.network
    assert len(trained.losses) == 50
    assert sum(trained.losses[-10:]) < 0.5 * sum(trained.losses[:10])
    fresh = training.build(recipe)
    data = training.data_of(recipe)[torch.arange(200)]
    text = model.encode_text(data.captions)

    def error(network: TextToImage, text: Tensor) -> float:
        with torch.no_grad():
            return float(epsilon_loss(lambda x, t: network(x, t, text), data.images, network.schedule, draw(5)))

    assert error(model, text) < 0.5 * error(fresh, text)
    assert not any(style in caption for caption in data.captions for style in STYLES)  # left for the fine-tuning


def test_a_base_model_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "papers").mkdir()
    (tmp_path / "dvc.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    short = replace(training.RECIPES["diffusion-shapes-dit"], width=32, depth=1, steps=3, count=50)
    monkeypatch.setitem(training.RECIPES, "diffusion-shapes-dit", short)
    made, first = training.trained("diffusion-shapes-dit")
    read, second = training.trained("diffusion-shapes-dit")
    assert (first.restored, second.restored) == (False, True) and first.sha256 == second.sha256
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), read.state_dict().values(), strict=True))
    monkeypatch.setitem(training.RECIPES, "diffusion-shapes-dit", replace(short, seed=1))
    assert not training.trained("diffusion-shapes-dit")[1].restored


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_models_on_cifar_have_one_to_four_million_parameters(kind: str):
    model = training.build(training.RECIPES[f"diffusion-cifar16-{kind}"])
    assert 1e6 < sum(p.numel() for p in model.core.parameters()) < 4e6
