"""Stable Diffusion 1.x, 2.x and 3 by name, on tiny random pipelines in the layout of diffusers."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from tiny_diffusion import stable_diffusion_3, write_pipeline, write_stable_diffusion
from torch import Tensor

from common.models.diffusion import ddim, times
from common.models.pretrained_text_to_image import PretrainedTextToImage
from common.models.stable_diffusion import MissingWeights
from common.models.text_to_image import noise_loss, sample

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves

KINDS = ("epsilon", "v_prediction", "flow")
Models = dict[str, PretrainedTextToImage]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("pipelines")
    (root / "parts").mkdir()
    parts = write_stable_diffusion(root / "parts")
    made = {"flow": PretrainedTextToImage(stable_diffusion_3(parts))}
    for kind in ("epsilon", "v_prediction"):
        name = write_pipeline(root / kind, parts, prediction=kind)
        made[kind] = PretrainedTextToImage.from_pretrained(name, device="cpu")
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_by_name_is_trained_and_sampled_as_the_small_models_are(kind: str, models: Models):
    model = models[kind]
    assert model.predicts == kind and all(p.requires_grad for p in model.core.parameters())
    assert not any(p.requires_grad for p in model.coder.parameters())
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 64, generator=draw) * 2 - 1
    text, nothing = model.encode_text(["a chair", "chair"]), model.encode_text([""])
    latents = model.encode(images)
    assert len(text) == 2 and nothing.shape == (1, *text.shape[1:]) and not text.requires_grad
    noise_loss(model, latents, text, nothing, draw).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.core.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.core.parameters())
    found = sample(
        model, text, nothing, steps=2, generator=draw, shape=tuple(latents.shape[1:]), limit=None, guidance=7.5
    )
    assert found.shape[:2] == (2, 3) and found.isfinite().all() and found.abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_latents_come_back_as_the_coder_has_them(kind: str, models: Models):
    """`decode` takes back the scale and the shift that `encode` puts on."""
    model = models[kind]
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        plain = model.coder.decode(model.coder.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(model.encode(image)), plain, atol=1e-5, rtol=0)


def test_a_caption_reaches_stable_diffusion_3_on_both_ways(models: Models):
    """Over the words, and over the pooled text in the last row."""
    model = models["flow"]
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    text = model.encode_text(["chair"])
    assert text.shape[-1] == 40 and not text[:, -1, 32:].any() and text[:, -1, :32].any()
    with torch.no_grad():
        base = model(x, t, text)
        for row in (0, -1):
            other = text.clone()
            other[:, row, :32] += 10
            assert not torch.allclose(model(x, t, other), base, atol=1e-4)


class Known:
    """A pipeline whose network predicts what it says, exactly, of one image: `core(x, time)`."""

    def __init__(self, kind: str, image: Tensor):
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.kind, self.image = kind, image
        self.vae = torch.nn.Identity()
        if kind == "flow":
            self.transformer, self.scheduler = (
                Core(self),
                types.SimpleNamespace(config=types.SimpleNamespace(shift=3.0)),
            )
        else:
            import diffusers

            self.unet = Core(self)
            self.scheduler = diffusers.DDPMScheduler(prediction_type=kind, **betas)


class Core(torch.nn.Module):
    def __init__(self, pipe: Known):
        super().__init__()
        self.known, self.config = [pipe], types.SimpleNamespace(pooled_projection_dim=2)

    def forward(self, x: Tensor, timestep: Tensor, **told: Tensor):
        pipe = self.known[0]
        if pipe.kind == "flow":
            s = (timestep / 1000)[:, None, None, None]
            found = (x - pipe.image) / s  # noise - x_0 of x = (1 - s) x_0 + s noise
        else:
            a = pipe.scheduler.alphas_cumprod[timestep][:, None, None, None]
            noise = (x - a.sqrt() * pipe.image) / (1 - a).sqrt()
            found = noise if pipe.kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * pipe.image
        return types.SimpleNamespace(sample=found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_network_predicts_becomes_the_noise(kind: str):
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(1, 4, 8, 8, generator=draw)
    model = PretrainedTextToImage(Known(kind, image))
    noise, text = torch.randn(3, 4, 8, 8, generator=draw), torch.zeros(1, 3, 4)
    t = torch.tensor([20, 400, 950])
    x = model.schedule.noised(image, noise, t)
    torch.testing.assert_close(model(x, t, text), noise, atol=1e-3, rtol=0)  # float32, divided by a small spread
    found = ddim(lambda x, t: model(x, t, text), noise, model.schedule, times(model.schedule, 20))
    torch.testing.assert_close(found, image.expand(3, -1, -1, -1), atol=1e-2, rtol=0)


def test_the_times_of_a_flow_are_shifted():
    """Half of the times lie where the noise's share is 3/4: s = 3 / 2 / (1 + 2 / 2)."""
    signal = PretrainedTextToImage(Known("flow", torch.zeros(1, 4, 8, 8))).schedule.signal
    share = (1 - signal).sqrt() / (signal.sqrt() + (1 - signal).sqrt())
    assert float(share[500]) == pytest.approx(0.75, abs=1e-5) and signal[0] == 1 and len(signal) == 1001


def test_what_cannot_be_loaded_or_understood(tmp_path: Path):
    with pytest.raises(MissingWeights, match="cannot be loaded"):
        PretrainedTextToImage.from_pretrained(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="predicts 'sample'"):
        PretrainedTextToImage(Known("sample", torch.zeros(1, 4, 8, 8)))
