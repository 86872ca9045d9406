"""Stable Diffusion with a controller fed by feature maps, on tiny random networks in diffusers' layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_diffusion import write_stable_diffusion
from torch import nn

from common.models.diffusion import epsilon_loss, train
from common.models.latent_control import LatentControlled
from common.models.stable_diffusion import MissingWeights

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_stable_diffusion(tmp_path_factory.mktemp("model"))


def hint(width: int) -> nn.Module:
    return nn.Conv2d(5, width, 3, padding=1)


@pytest.fixture
def network(model: str) -> LatentControlled:
    return LatentControlled.from_pretrained(model, "a chair", hint)


def test_a_new_controller_changes_nothing(network: LatentControlled):
    x, t, maps = torch.rand(2, 4, 8, 8), torch.tensor([100, 700]), torch.rand(2, 5, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x, t, maps), network.denoiser(x, t))


def test_only_the_controller_learns_and_it_hears_its_map(network: LatentControlled):
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith("control.") for name in trained)
    before = {name: value.clone() for name, value in network.named_parameters() if name not in trained}
    x, maps = torch.rand(2, 4, 8, 8), torch.rand(2, 5, 8, 8)

    def loss(model, draw):
        return epsilon_loss(lambda x, t: model(x, t, maps), x, network.schedule, draw)

    train(network, loss, steps=3, learning_rate=1e-2, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters() if name in before)
    with torch.no_grad():
        t = torch.tensor([300, 300])
        assert not torch.equal(network(x, t, maps), network(x, t, maps.flip(0)))
        assert not torch.equal(network(x, t, maps), network.denoiser(x, t))


def test_the_gradient_reaches_the_picture_through_the_encoder(network: LatentControlled):
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    latents = network.encode(2 * image - 1)
    assert latents.shape == (1, 4, 8, 8) and network.decode(latents).shape == image.shape
    latents.square().mean().backward()
    assert image.grad is not None and float(image.grad.abs().max()) > 0
    with pytest.raises(ValueError, match="multiples of 64"):
        network.encode(torch.zeros(1, 3, 48, 48))


def test_missing_weights_are_named_with_the_way_out(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match="layout of diffusers"):
        LatentControlled.from_pretrained(str(tmp_path / "empty"), "a chair", hint)
