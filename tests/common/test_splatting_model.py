"""Gaussians from points, their pictures, and the scores of pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.metrics.image import ssim
from common.splatting.cameras import Camera
from common.splatting.evaluation import evaluate, score, tight_box
from common.splatting.generated import object_scene
from common.splatting.model import FIELDS, Gaussians, render
from common.splatting.scene import PointCloud, View


def view_of(image: Tensor, mask: Tensor | None) -> View:
    camera = Camera(torch.eye(4), torch.tensor([[20.0, 0, 10], [0, 20, 8], [0, 0, 1]]), 20, 16)
    return View("v", camera, image, mask=mask)


def test_masked_scores_look_at_the_object() -> None:
    image, mask = torch.full((16, 20, 3), 0.5), torch.zeros(16, 20)
    mask[4:9, 5:15] = 1
    mask[4, 5] = 0.2
    render = image.clone()
    render[4:9, 5:15] += 0.1
    render[0, 0] = 3.0  # limited to 1
    found = score(view_of(image, mask), render)
    assert found.psnr_masked == pytest.approx(20.0, abs=1e-4)
    assert found.psnr == pytest.approx(-10 * torch.log10(torch.tensor((50 * 0.01 + 0.25) / 320)).item(), abs=1e-4)
    same = score(view_of(image, None), image)
    assert same.psnr_masked is None and same.psnr == float("inf") and same.ssim == pytest.approx(1.0)
    box = (slice(None), slice(4, 9), slice(5, 15))
    expected = ssim(render.movedim(-1, 0)[box], image.movedim(-1, 0)[box], data_range=1.0, border="zero")
    assert found.ssim_masked == pytest.approx(float(expected.mean()))
    assert score(view_of(image, torch.zeros(16, 20)), render).ssim_masked is None
    with pytest.raises(ValueError, match="no views"):
        evaluate(Gaussians.random(5, (0, 0, 1), (1, 1, 2), generator=torch.Generator()), [])


def test_tight_box_by_hand() -> None:
    mask = torch.zeros(6, 8)
    mask[2, 3], mask[4, 5], mask[0, 0] = 1.0, 0.9, 0.5  # half a pixel does not belong
    assert tight_box(mask) == (slice(2, 5), slice(3, 6))
    assert tight_box(torch.zeros(6, 8)) is None


def test_points_become_gaussians_as_wide_as_their_neighbours_are_far() -> None:
    positions = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [100, 0, 0]])
    colors = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    model = Gaussians.from_points(PointCloud(positions, colors), sh_degree=2, initial_opacity=0.3)
    assert model.log_scales.detach()[0].exp().tolist() == pytest.approx([((1 + 4 + 9) / 3) ** 0.5] * 3)
    assert torch.allclose(model.opacity_logits.detach().sigmoid(), torch.tensor(0.3))
    assert model.sh_degree == 2 and len(model) == 5
    assert torch.allclose(0.5 + 0.28209479 * model.sh0.detach()[:, 0], colors, atol=1e-6)
    same = PointCloud(torch.zeros(3, 3), colors[:3])
    assert float(Gaussians.from_points(same).log_scales.detach().exp().min()) == pytest.approx(1e-7**0.5)
    with pytest.raises(ValueError, match="got 1 points, expected 2 or more"):
        Gaussians.from_points(PointCloud(positions[:1], colors[:1]))
    with pytest.raises(ValueError, match="sh_degree 0, 1, 2 or 3"):
        Gaussians.from_points(same, sh_degree=4)


def test_random_gaussians_fill_their_box() -> None:
    model = Gaussians.random(500, (-1, 0, 2), (1, 1, 4), generator=torch.Generator().manual_seed(0), sh_degree=0)
    low, high = model.means.detach().amin(dim=0), model.means.detach().amax(dim=0)
    corner, opposite = torch.tensor([-1.0, 0, 2]), torch.tensor([1.0, 1, 4])
    assert bool((low >= corner).all()) and bool((high <= opposite).all())
    assert bool((high - low > 0.95 * (opposite - corner)).all())


def test_wrong_parameters_are_named() -> None:
    good = Gaussians.random(4, (0, 0, 0), (1, 1, 1), generator=torch.Generator()).values()
    for name in FIELDS[1:]:
        with pytest.raises(ValueError, match=name):
            Gaussians(**{**good, name: good[name][:-1]})
    with pytest.raises(ValueError, match="3, 8 or 15"):
        Gaussians(**{**good, "shN": good["shN"][:, :7]})
    with pytest.raises(ValueError, match=r"float64"):
        Gaussians(**{**good, "means": good["means"].double()})


def test_renders_of_several_cameras_and_degrees() -> None:
    scene = object_scene(0, views=3, tests=1, size=(48, 36), points=300)
    assert scene.points is not None
    model = Gaussians.from_points(scene.points, sh_degree=1, initial_opacity=0.6)
    model.shN.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    cameras = [view.camera for view in scene.train]
    with torch.no_grad():
        both = model.render(cameras, mode="RGB+ED")
        one = model.render(cameras[1], mode="RGB+ED")
        assert both.image.shape == (3, 36, 48, 3) and both.alpha.shape == (3, 36, 48)
        assert both.depth is not None and one.depth is not None
        assert torch.allclose(both.image[1], one.image, atol=1e-6)
        assert torch.allclose(both.depth[1], one.depth, atol=1e-5)
        white = model.render(cameras[1], background=torch.ones(3))
        assert torch.allclose(white.image, one.image + (1 - one.alpha)[..., None], atol=1e-5)
        assert white.depth is None and model.render(cameras[1], mode="ED").image.shape == (36, 48, 0)
        flat = model.render(cameras[1], sh_degree=0).image
        assert not torch.allclose(flat, one.image, atol=1e-3)
        plain = render(model.splats()._replace(colors=torch.ones(len(model), 2)), cameras[1])
        assert torch.allclose(plain.image, one.alpha[..., None].expand(-1, -1, 2), atol=1e-5)
    with pytest.raises(ValueError, match=r"hold degrees 0\.\.1"):
        render(model.splats(), cameras[0], sh_degree=2)
    with pytest.raises(ValueError, match="cameras of one size"):
        model.render([cameras[0], cameras[1].resized(24, 18)])
