"""The loaders of pretrained networks, on tiny random networks in the same layouts, and their errors."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_diffusion import write_control_net, write_stable_diffusion

from common.models import lora
from common.models.diffusion import epsilon_loss, sdedit, train
from common.splatting import View, intrinsics, look_at

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("weights")
    model = write_stable_diffusion(root)
    return model, write_control_net(root / "control", model)


@pytest.fixture
def network(weights: tuple[str, str]):
    from common.models.stable_diffusion import StableDiffusion

    return StableDiffusion.from_pretrained(*weights)


def test_stable_diffusion_repairs_in_latents(network):
    image = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text, latents = network.encode_text("a chair"), network.encode(2 * image - 1)
        assert latents.shape == (1, 4, 8, 16) and text.shape == (1, 8, 16)
        draw = torch.Generator().manual_seed(1)
        options = {"strength": 0.2, "steps": 50, "eta": 1.0}
        found = sdedit(
            lambda x, t: network(x, t, text, image, 0.8), latents, network.schedule, generator=draw, **options
        )
        assert network.decode(found).shape == image.shape and torch.isfinite(found).all()
    assert network.schedule.steps == 1000 and float(network.schedule.signal[1]) == pytest.approx(1 - 0.00085, rel=1e-5)
    with pytest.raises(ValueError, match="multiples of 64"):
        network.encode(torch.zeros(1, 3, 40, 64))


def test_the_control_net_is_heard_and_can_be_silenced(network):
    x, t, image = torch.rand(1, 4, 8, 8), torch.tensor([100]), torch.rand(1, 3, 64, 64)
    for block in network.control.controlnet_down_blocks:  # they begin at zero
        torch.nn.init.normal_(block.weight)
    with torch.no_grad():
        text = network.encode_text("a chair")
        plain = network.unet(x, t - 1, encoder_hidden_states=text).sample
        assert torch.allclose(network(x, t, text, image, 0.0), plain, atol=1e-6)
        assert not torch.allclose(network(x, t, text, image), plain, atol=1e-3)


def test_adapting_trains_low_rank_parts_of_all_three_networks_alone(network):
    trained = network.adapt(rank=2)
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in trained}
    for part in (network.unet, network.control, network.text):
        assert lora.state(part)
    image, latents = torch.rand(1, 3, 64, 64), torch.rand(1, 4, 8, 8)
    before = network.encode_text("a chair").detach()

    def loss(model, draw):
        text = network.encode_text("a chair")
        return epsilon_loss(lambda x, t: model(x, t, text, image), latents, network.schedule, draw)

    train(network, loss, steps=3, learning_rate=1e-2, seed=0, parameters=trained)
    assert not torch.equal(network.encode_text("a chair"), before)


def test_missing_weights_are_named_with_the_way_out(tmp_path: Path, weights: tuple[str, str]):
    from common.models.stable_diffusion import MissingWeights, StableDiffusion

    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match=r"empty cannot be loaded .* folder"):
        StableDiffusion.from_pretrained(weights[0], str(tmp_path / "empty"))


def test_marigold_names_missing_weights(tmp_path: Path):
    from common.models.marigold import Marigold
    from common.models.stable_diffusion import MissingWeights

    with pytest.raises(MissingWeights, match="cannot be loaded"):
        Marigold(str(tmp_path), str(tmp_path))


def test_marigolds_normals_arrive_in_world_axes(monkeypatch: pytest.MonkeyPatch):
    """A wall that faces the viewer has normals (0, 0, 1) in Marigold's axes; here the viewer looks along +y."""
    from common.models import marigold

    class Pipe:
        def __init__(self, answer):
            self.answer = answer

        def to(self, device):
            return self

        def set_progress_bar_config(self, **options):
            pass

        def __call__(self, image, **options):
            assert options["output_type"] == "pt" and image.shape == (1, 3, 6, 8)
            return types.SimpleNamespace(prediction=self.answer)

    normals = torch.tensor([0.0, 0.6, 0.8])[None, :, None, None].expand(1, 3, 6, 8)  # a little upwards
    answers = iter([Pipe(torch.full((1, 1, 6, 8), 0.25)), Pipe(normals)])
    monkeypatch.setattr(marigold, "_load", lambda kind, name: next(answers))
    K = intrinsics(8, 6, fov_x_rad=1.0)
    view = View("a", look_at((0, -3, 0), (0, 0, 0), (0, 0, 1), K, 8, 6), torch.rand(6, 8, 3))
    depth, found = marigold.Marigold("depth", "normals")(view)
    assert depth.shape == (6, 8) and float(depth.mean()) == 0.25
    torch.testing.assert_close(found[0, 0], torch.tensor([0.0, -0.8, 0.6]))  # towards the camera, and up


def test_dust3r_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    from common.models.dust3r import dust3r

    monkeypatch.setitem(sys.modules, "dust3r", None)
    with pytest.raises(ModuleNotFoundError, match=r"github\.com/naver/dust3r"):
        dust3r([], "weights")
