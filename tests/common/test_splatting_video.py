"""Videos: every frame arrives, as H.264 that browsers play or as GIF, and looks like its render."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from common.splatting import video
from common.splatting.cameras import Camera, path_through
from common.splatting.generated import object_scene
from common.splatting.model import Gaussians


@pytest.fixture(scope="module")
def subject() -> tuple[Gaussians, list[Camera]]:
    """A model, and a path of 7 cameras of 49 x 37 pixels."""
    scene = object_scene(0, views=3, tests=1, size=(49, 37), points=300)
    assert scene.points is not None
    model = Gaussians.from_points(scene.points, initial_opacity=0.9)
    return model, path_through([view.camera for view in scene.train], 7)


def renders(model: Gaussians, cameras: list[Camera]) -> np.ndarray:
    with torch.no_grad():
        images = [model.render(camera, background=torch.tensor([0.2, 0.4, 0.8])).image for camera in cameras]
    return (torch.stack(images).clamp(0, 1) * 255).numpy()


def test_mp4_is_what_browsers_play(tmp_path: Path, subject: tuple[Gaussians, list[Camera]]) -> None:
    model, cameras = subject
    background = torch.tensor([0.2, 0.4, 0.8])
    video.write(tmp_path / "v.mp4", model, cameras, fps=10, background=background, progress=False)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (50, 38)  # even, as yuv420p must be
        assert stream.average_rate == 10
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(frames) == len(cameras)
    # chroma at half the resolution and a lossy codec: a few grey values on average; a wrong colour matrix costs ten
    assert np.abs(frames[:, :37, :49] - renders(model, cameras)).mean() < 4
    np.testing.assert_allclose(frames[:, 37, :49].astype(float), frames[:, 36, :49], atol=12)  # the repeated row


def test_gif_has_every_frame_and_its_time(tmp_path: Path, subject: tuple[Gaussians, list[Camera]]) -> None:
    model, cameras = subject
    background = torch.tensor([0.2, 0.4, 0.8])
    video.write(tmp_path / "v.gif", model, cameras, fps=30, background=background, progress=False)
    with Image.open(tmp_path / "v.gif") as gif:
        assert gif.size == (49, 37) and gif.n_frames == 7 and gif.info["loop"] == 0
        frames, milliseconds = [], 0
        for number in range(7):
            gif.seek(number)
            frames.append(np.asarray(gif.convert("RGB")))
            milliseconds += gif.info["duration"]
    assert milliseconds == 230  # 7/30 s in steps of 10 ms, not 7 times 30 ms
    assert np.abs(np.stack(frames) - renders(model, cameras)).mean() < 6  # 256 colours a frame


def test_one_frame_is_a_video(tmp_path: Path, subject: tuple[Gaussians, list[Camera]]) -> None:
    model, cameras = subject
    for name in ("v.gif", "v.mp4"):
        video.write(tmp_path / name, model, cameras[:1], progress=False)
        assert (tmp_path / name).stat().st_size > 100


def test_a_broken_rendering_leaves_no_file(tmp_path: Path, subject: tuple[Gaussians, list[Camera]]) -> None:
    model, cameras = subject
    before = model.render
    calls = []

    def render(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError("too many intersections")
        return before(*arguments, **options)  # type: ignore[arg-type]

    for name in ("v.mp4", "v.gif"):
        calls.clear()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError, match="too many"):
            patch.setattr(Gaussians, "render", lambda self, *a, **o: render(*a, **o))
            video.write(tmp_path / name, model, cameras, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_makes_no_video_says_why(tmp_path: Path, subject: tuple[Gaussians, list[Camera]]) -> None:
    model, cameras = subject
    with pytest.raises(ValueError, match=r"ends in '\.avi'; expected \.mp4 or \.gif"):
        video.write(tmp_path / "v.avi", model, cameras)
    with pytest.raises(ValueError, match="no camera"):
        video.write(tmp_path / "v.mp4", model, [])
    with pytest.raises(ValueError, match="cameras of one size"):
        video.write(tmp_path / "v.mp4", model, [cameras[0], cameras[0].resized(20, 20)])
    with pytest.raises(ValueError, match=r"fps is 60, expected 1 to 50 for \.gif"):
        video.write(tmp_path / "v.gif", model, cameras, fps=60)
