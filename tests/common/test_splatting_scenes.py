"""Views, point clouds and scenes, and the splits of the papers."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.splatting import PointCloud, Scene, SceneError, Split, View, intrinsics, look_at, splits

K = intrinsics(8, 6, fov_x_rad=1.0)


def view(name="a", place=0.0, **more):
    camera = look_at((3, place, 1), (0, 0, 0), (0, 0, 1), K, 8, 6)
    return View(name, camera, torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(0)), **more)


def cloud(**more):
    values = {"positions": torch.arange(12.0).reshape(4, 3), "colors": torch.rand(4, 3)}
    return PointCloud(**values | more)


TRACKS = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]]).bool()


def test_a_view_shrinks_with_its_camera():
    depth = torch.arange(48.0).reshape(6, 8)
    whole = view(mask=torch.ones(6, 8), depth=depth, normals=torch.zeros(6, 8, 3))
    small = whole.resized(4, 3)
    assert torch.allclose(small.image, whole.image.reshape(3, 2, 4, 2, 3).mean(dim=(1, 3)))
    assert small.normals.shape == (3, 4, 3) and small.mask.min() == 1
    assert set(small.depth.flatten().tolist()) <= set(depth.flatten().tolist()), "depths are picked, not averaged"
    assert (small.camera.width, small.camera.height) == (4, 3) and small.camera.K[0, 0] == K[0, 0] / 2
    assert whole.resized(8, 6).image.equal(whole.image)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", torch.zeros(8, 6, 3)),
        ("image", torch.zeros(6, 8, 3, dtype=torch.uint8)),
        ("mask", torch.zeros(6, 8, 1)),
        ("depth", torch.zeros(6, 7)),
        ("normals", torch.zeros(6, 8)),
    ],
)
def test_a_view_refuses_what_does_not_fit_its_camera(field, value):
    whole = view()
    with pytest.raises(SceneError, match=rf"view a: {field} is float32 \[6, 8"):
        View(**{"name": "a", "camera": whole.camera, "image": whole.image} | {field: value})


def test_points_are_kept_by_who_saw_them():
    points = cloud(view_names=("a", "b", "c"), seen=TRACKS, normals=torch.ones(4, 3))
    assert points.seen_by(["a", "b"]).positions[:, 0].tolist() == [0, 9]
    assert points.seen_by(["a"], at_least=1).positions[:, 0].tolist() == [0, 3, 9]
    kept = points.seen_by(["c", "a"])
    assert kept.view_names == ("c", "a") and kept.seen.all() and len(kept.normals) == len(kept) == 2
    assert len(points.seen_by(["a", "a"])) == 0, "one view twice is one view"
    with pytest.raises(SceneError, match="no view 'd'"):
        points.seen_by(["d"])
    with pytest.raises(SceneError, match="no tracks"):
        cloud().seen_by(["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colors": torch.zeros(3, 3)}, r"colors is float32 \[P, 3\], P = 4"),
        ({"positions": torch.zeros(4, 3).double()}, "positions is float32"),
        ({"positions": torch.full((4, 3), math.inf)}, "NaN or Inf"),
        ({"seen": TRACKS}, r"seen is bool \[4, 0\]"),
        ({"normals": torch.zeros(4, 2)}, "normals"),
    ],
)
def test_a_cloud_refuses_what_does_not_fit(change, message):
    with pytest.raises(SceneError, match=message):
        cloud(**change)


def test_extent_is_that_of_3dgs():
    views = [view(str(i), place) for i, place in enumerate((-1.0, 0.0, 4.0))]
    assert Scene("s", tuple(views)).extent == pytest.approx(1.1 * 3.0)
    assert Scene("s", tuple(views[:2]), test=(views[2],)).extent == pytest.approx(1.1 * 0.5), (
        "test cameras do not count"
    )


def test_a_scene_refuses_leaks_and_lone_views():
    with pytest.raises(SceneError, match=r"'a' occurs twice"):
        Scene("s", (view("a"), view("b")), (view("a"),))
    with pytest.raises(SceneError, match="1 training views, expected 2"):
        Scene("s", (view("a"),))
    assert Scene("s", (view("a"),), allow_single=True).extent == 0
    with pytest.raises(SceneError, match="0 training views"):
        Scene("s", (), allow_single=True)
    with pytest.raises(SceneError, match="point cloud is empty"):
        Scene("s", (view("a"), view("b")), points=PointCloud(torch.zeros(0, 3), torch.zeros(0, 3)))


def test_a_scene_shrinks_as_a_whole():
    small = Scene("s", (view("a"), view("b")), (view("c"),)).shrunk(2)
    assert [v.image.shape for v in (*small.train, *small.test)] == [(3, 4, 3)] * 3
    with pytest.raises(SceneError, match="factor >= 1"):
        small.shrunk(0.5)


def test_llff_fern_at_three_six_and_nine_views():
    """Twenty photographs. The test views as published; RegNeRF's linspace over the seventeen others, by hand."""
    assert splits.hold_out(20).test == (0, 8, 16)
    assert splits.hold_out(20, 3).train == (1, 10, 19)
    assert splits.hold_out(20, 6).train == (1, 4, 7, 12, 15, 19)  # places 0, 3.2, 6.4, 9.6, 12.8, 16 of the rest
    assert len(splits.hold_out(20).train) == 17


@given(st.integers(2, 300), st.integers(1, 40))
def test_hold_out_never_mixes_and_spreads_evenly(count, views):
    rest = count - math.ceil(count / 8)
    if views > rest:
        with pytest.raises(SceneError, match=f"{views} training views asked for, but {rest}"):
            splits.hold_out(count, views)
        return
    split = splits.hold_out(count, views)
    assert len(split.train) == views and not set(split.train) & set(split.test)
    assert all(index % 8 == 0 for index in split.test) and all(index % 8 for index in split.train)
    if views > 1:
        others = [index for index in range(count) if index % 8]
        assert (split.train[0], split.train[-1]) == (others[0], others[-1])
        places = [others.index(index) for index in split.train]
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert max(gaps) - min(gaps) <= 1


def test_dtu_has_nested_training_views_and_always_the_same_25_for_testing():
    assert splits.dtu(3).train == (25, 22, 28)
    assert splits.dtu(9).train[:6] == splits.dtu(6).train == (25, 22, 28, 40, 44, 48)
    assert len(splits.dtu(3).test) == 25 and splits.dtu(3).test == splits.dtu(9).test
    assert not {3, 7, 16, 21, 36, 39} & set(splits.dtu(3).test)
    assert len(splits.DTU_SCANS) == 15
    with pytest.raises(SceneError, match="10 views"):
        splits.dtu(10)


def test_blender_ids():
    assert splits.blender() == (26, 86, 2, 55, 75, 93, 16, 73)
    with pytest.raises(SceneError, match="0 views"):
        splits.blender(0)


def test_a_spare_split_is_read(tmp_path):
    path = tmp_path / "Track1_split_test.json"
    path.write_text(json.dumps({"scan63": {"input_views": [3, 1], "test_views": [13], "dataset": "DTU"}}))
    assert splits.spare(path) == {"scan63": splits.SpareSplit((3, 1), (13,), "DTU")}
    for text in (
        "{",
        "[]",
        '{"a": {"input_views": [1]}}',
        '{"a": {"input_views": 1, "test_views": [2], "dataset": ""}}',
    ):
        path.write_text(text)
        with pytest.raises(SceneError, match="not a SpaRe split"):
            splits.spare(path)
    path.write_text(json.dumps({"a": {"input_views": [1, 2], "test_views": [2], "dataset": "DTU"}}))
    with pytest.raises(SceneError, match=r"\[2\] more than once"):
        splits.spare(path)
    with pytest.raises(FileNotFoundError, match="Track1_split_test"):
        splits.spare(tmp_path / "none.json")


NAMES = ["x/a.png", "x/b.png", "x/c.png", "y/a.png"]


def test_views_are_chosen_by_index_and_by_name():
    assert splits.choose(NAMES, train=[2, "b"]) == Split((2, 1), (0, 3))
    assert splits.choose(NAMES, train=["x/a"], test=["y/a.png"]) == Split((0,), (3,))
    assert splits.choose(NAMES, test=[0]) == Split((1, 2, 3), (0,))
    assert splits.choose(NAMES, test=[0], views=2) == Split((1, 3), (0,))
    assert splits.choose(NAMES, views=2) == splits.hold_out(4, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": ["a"]}, "2 views are called so"),
        ({"train": ["x/bb.png"]}, "did you mean 'x/b.png'"),
        ({"train": [4]}, "view 4: there are 4 views, 0 to 3"),
        ({"train": [-1]}, "view -1"),
        ({"train": [1], "test": [1]}, r"\[1\] more than once"),
        ({"train": [0, 0]}, r"\[0\] more than once"),
        ({"train": [0], "views": 2}, "give one of them"),
        ({"test": [0], "views": 4}, "4 training views asked for, but 3"),
    ],
)
def test_a_wrong_choice_says_why(arguments, message):
    with pytest.raises(SceneError, match=message):
        splits.choose(NAMES, **arguments)
