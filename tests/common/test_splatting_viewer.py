"""The viewer's page in a real browser: it draws what we render, moves, and asks nobody for anything."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from PIL import Image

from common.splatting import viewer
from common.splatting.cameras import Camera
from common.splatting.generated import object_scene
from common.splatting.model import Gaussians

chromium = browser.chromium

WIDTH, HEIGHT = 160, 120
BACKGROUND = torch.tensor([0.2, 0.3, 0.6])


@pytest.fixture(scope="module")
def subject() -> tuple[Gaussians, list[Camera]]:
    """Gaussians of many sizes and shapes, SH degree 0, and three cameras."""
    scene = object_scene(0, views=3, tests=1, size=(WIDTH, HEIGHT), points=3000)
    assert scene.points is not None
    model = Gaussians.from_points(scene.points, sh_degree=0, initial_opacity=0.8)
    g = torch.Generator().manual_seed(0)
    model.log_scales.data += 0.7 * torch.randn(model.log_scales.shape, generator=g)
    model.quats.data = torch.randn(model.quats.shape, generator=g)
    model.opacity_logits.data += torch.randn(model.opacity_logits.shape, generator=g)
    return model, [view.camera for view in scene.train]


class Shown(browser.Visit):
    """The page at the cameras' size, without the words over the picture."""

    def __init__(self, chromium: Any, path: Path, content: str, *, hidden: bool = True) -> None:
        super().__init__(chromium, WIDTH)
        path.write_text(content)
        self.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.body.dataset.state || document.querySelector('iframe')")
        if hidden:
            self.page.add_style_tag(content="header, footer { display: none }")

    def picture(self) -> np.ndarray:
        """[H, W, 3], 0..1, once nothing is left to sort or draw."""
        self.page.wait_for_function("!sorting && !stale && !pending")
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        with Image.open(io.BytesIO(self.page.screenshot())) as image:
            return np.asarray(image.convert("RGB")) / 255

    @property
    def complaints(self) -> list[str]:
        """Faults, without the driver's notes on the speed of taking screenshots."""
        return [fault for fault in self.faults if "GPU stall due to ReadPixels" not in fault]


def rendered(model: Gaussians, camera: Camera, *, antialiased: bool = False) -> np.ndarray:
    with torch.no_grad():
        return model.render(camera, background=BACKGROUND, antialiased=antialiased).image.clamp(0, 1).numpy()


@pytest.mark.parametrize("antialiased", [False, True])
def test_the_page_shows_what_we_render(
    chromium: Any, tmp_path: Path, subject: tuple[Gaussians, list[Camera]], antialiased: bool
) -> None:
    model, cameras = subject
    content = viewer.page(model, cameras, title="t", background=BACKGROUND, antialiased=antialiased)
    with Shown(chromium, tmp_path / "v.html", content) as shown:
        first = shown.picture()
        shown.page.evaluate("document.getElementById('next').click()")
        second = shown.picture()
        assert shown.complaints == []
    for picture, camera in ((first, cameras[0]), (second, cameras[1])):
        expected = rendered(model, camera, antialiased=antialiased)
        # colours, opacities and rotations in 8 bits, and 8 bits for the sum of dozens of layers; where two splats are
        # equally deep to float32, either may be in front, so no bound on the largest difference
        assert np.abs(picture - expected).mean() < 0.01
        assert np.quantile(np.abs(picture - expected), 0.99) < 0.05
    assert np.abs(first - second).mean() > 0.03  # the bound above can tell two views apart


def test_dragging_turns_and_scrolling_comes_closer(
    chromium: Any, tmp_path: Path, subject: tuple[Gaussians, list[Camera]]
) -> None:
    model, cameras = subject
    with Shown(chromium, tmp_path / "v.html", viewer.page(model, cameras, title="t")) as shown:
        before = shown.page.evaluate("({axes: pose.axes, eye: pose.eye, pivot: pose.pivot})")
        start = shown.picture()
        mouse = shown.page.mouse
        mouse.move(80, 60)
        mouse.down()
        mouse.move(100, 60, steps=4)
        mouse.up()
        turned = shown.page.evaluate("({axes: pose.axes, eye: pose.eye, pivot: pose.pivot})")
        assert np.abs(shown.picture() - start).mean() > 0.02
        arms = [np.subtract(p["eye"], p["pivot"]) for p in (before, turned)]
        angle = math.acos(np.dot(*arms) / np.prod([np.linalg.norm(arm) for arm in arms]))
        assert np.linalg.norm(arms[0]) == pytest.approx(np.linalg.norm(arms[1]))
        assert 0.1 < angle <= 4 * 20 / WIDTH + 1e-6  # less than the turn where the arm leans out of the level
        assert np.allclose(np.array(turned["axes"]) @ np.array(turned["axes"]).T, np.eye(3), atol=1e-9)

        mouse.wheel(0, -200)
        shown.picture()
        closer = shown.page.evaluate("Math.hypot(...add(pose.eye, pose.pivot, -1))")
        assert closer == pytest.approx(np.linalg.norm(arms[0]) * math.exp(-0.2), rel=1e-6)
        assert shown.complaints == []


def test_a_cell_shows_the_same_page_in_a_frame(
    chromium: Any, tmp_path: Path, subject: tuple[Gaussians, list[Camera]]
) -> None:
    model, cameras = subject
    shown_cell = viewer.cell(model, cameras, title='a "title" & <tag>', background=BACKGROUND, height=HEIGHT)
    document = f"<!doctype html><body style='margin:0'>{shown_cell.data}</body>"
    with Shown(chromium, tmp_path / "n.html", document, hidden=False) as shown:
        frame = shown.page.frames[1]
        frame.wait_for_function("document.body.dataset.state === 'ready'")
        assert frame.title() == 'a "title" & <tag>'
        assert frame.evaluate("splats.count") == 3000
        assert shown.complaints == []


def test_without_webgl_the_page_says_so(chromium: Any, tmp_path: Path, subject: tuple[Gaussians, list[Camera]]) -> None:
    with browser.Visit(chromium, 400) as visit:
        visit.page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
        (tmp_path / "v.html").write_text(viewer.page(*subject, title="t"))
        visit.page.goto((tmp_path / "v.html").as_uri())
        visit.page.wait_for_function("document.body.dataset.state === 'failed'")
        assert "needs WebGL 2" in visit.page.inner_text("#message")


def test_the_page_is_one_file_of_a_known_size(subject: tuple[Gaussians, list[Camera]]) -> None:
    model, cameras = subject
    content = viewer.page(model, cameras, title="</title><script>alert(1)</script>", most=1000)
    assert "<script>alert" not in content
    assert not re.search(r"""(?:src|href)\s*=|https?://|@import|url\(""", content)
    found = re.search(r'<script type="application/json" id="scene">(.*?)</script>', content, re.DOTALL)
    assert found
    scene = json.loads(found[1])
    assert len(scene["cameras"]) == 3 and len(scene["payload"]) == math.ceil(1000 * 32 / 3) * 4
    assert viewer.page(model, cameras, title="t", most=10_000) == viewer.page(model, cameras, title="t")
    with pytest.raises(ValueError, match="got 0 cameras"):
        viewer.page(model, [], title="t")
