"""LM-Gaussian with networks of the authors' kinds: tiny random ones in the same layouts, and made-up answers of two."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_diffusion import write_control_net, write_stable_diffusion

from common import params as parameters
from common.models import lora
from common.models.stable_diffusion import MissingWeights
from common.splatting import Scene, View, intrinsics, look_at
from papers.lm_gaussian import pretrained
from papers.lm_gaussian.settings import Params

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    root = tmp_path_factory.mktemp("weights")
    model = write_stable_diffusion(root)
    control = write_control_net(root / "control", model)
    small = {"device": "cpu", "prompt": "a chair", "stable_diffusion": model, "controlnet": control}
    small |= {"lora_rank": 2, "lora_steps": 2, "lora_crop": 64, "ddim_steps": 10, "between": 2}
    return dataclasses.replace(parameters.load(Params, "lm_gaussian", "paper"), **small)


def pictures(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def pairs(height: int, width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    bad, good = (pictures(1, height, width, seed)[0].movedim(-1, 0) for seed in (1, 2))
    return [(bad, good)]


def test_renders_of_any_size_come_back_in_that_size_and_every_round_draws_anew(params: Params):
    repair = pretrained.repairer(params, None, seed=0)
    renders = pictures(2, 40, 70)
    first, again, later = repair(renders, 0), repair(renders, 0), repair(renders, 1)
    assert first.shape == renders.shape
    assert first.min() >= 0 and first.max() <= 1 and torch.isfinite(first).all()
    assert torch.equal(first, again), "a round's noise is of its seed and number"
    assert not torch.equal(first, later)
    assert not lora.state(repair.network.unet), "no pairs, no adaptation"


def test_padding_repeats_the_last_row_and_column():
    picture = pictures(1, 40, 70).movedim(-1, 1)
    wide = pretrained._padded(picture)
    assert wide.shape == (1, 3, 64, 128)
    assert torch.equal(wide[..., :40, :70], picture)
    assert torch.equal(wide[..., 63, :70], picture[..., 39, :])
    assert torch.equal(wide[..., :40, 127], picture[..., 69])
    exact = pictures(1, 64, 128).movedim(-1, 1)
    assert torch.equal(pretrained._padded(exact), exact)


def test_adapting_to_a_scene_changes_what_is_repaired_and_nothing_of_the_networks_own(params: Params):
    plain = pretrained.repairer(params, None, seed=0)
    own = {name: value.clone() for name, value in plain.network.unet.state_dict().items()}
    adapted = pretrained.repairer(params, pairs(64, 80), seed=0)
    for part in (adapted.network.unet, adapted.network.control, adapted.network.text):
        assert lora.state(part), "U-Net, ControlNet and text encoder"
    kept = {name.replace(".layer.", "."): value for name, value in adapted.network.unet.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in own.items())
    renders = pictures(1, 64, 64)
    assert not torch.equal(plain(renders, 0), adapted(renders, 0))


def test_adapting_gives_a_loss_for_each_step(params: Params):
    network = pretrained.repairer(params, None, seed=0)
    assert len(network.adapt(pairs(64, 80))) == params.lora_steps


def test_photographs_smaller_than_the_latents_unit_are_refused(params: Params):
    with pytest.raises(ValueError, match="smaller than 64 pixels"):
        pretrained.repairer(params, pairs(64, 48), seed=0)


def test_missing_weights_are_named(params: Params, tmp_path):
    with pytest.raises(MissingWeights, match="cannot be loaded"):
        pretrained.repairer(dataclasses.replace(params, controlnet=str(tmp_path)), None, seed=0)


def photographed() -> Scene:
    K = intrinsics(8, 6, fov_x_rad=1.0)
    places = [look_at((x, -3, 0), (0, 0, 0), (0, 0, 1), K, 8, 6) for x in (-1.0, 0.0, 1.0)]
    views = [View(f"photo {number}", place, torch.rand(6, 8, 3)) for number, place in enumerate(places)]
    return Scene("yard", tuple(views))


def test_a_case_holds_what_the_networks_say_of_each_view(params: Params, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def stereo(views, weights, *, device):
        asked.append((weights, device))
        return [(torch.full((6, 8), 1.0 + number), torch.full((6, 8), 9.0)) for number in range(len(views))]

    class Marigold:
        def __init__(self, depth, normals, *, device):
            asked.append((depth, normals, device))

        def __call__(self, view):
            return torch.full((6, 8), float(view.name[-1])), torch.zeros(6, 8, 3)

    monkeypatch.setattr(pretrained, "dust3r", stereo)
    monkeypatch.setattr(pretrained, "Marigold", Marigold)
    found = pretrained.case(params, photographed())
    assert asked == [(params.dust3r, "cpu"), (params.marigold_depth, params.marigold_normals, "cpu")]
    for number in range(3):
        assert float(found.stereo[f"photo {number}"].depth.mean()) == 1 + number
        assert float(found.stereo[f"photo {number}"].confidence.mean()) == 9
        assert float(found.mono[f"photo {number}"].depth.mean()) == number
    assert len(found.virtual) == 2 * params.between, "an open walk: two gaps between three photographs"
    assert found.truth is None and found.perfect_mono is None


def test_a_case_says_how_to_get_the_networks(params: Params, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "dust3r", None)
    with pytest.raises(ModuleNotFoundError, match=r"github\.com/naver/dust3r"):
        pretrained.case(params, photographed())
