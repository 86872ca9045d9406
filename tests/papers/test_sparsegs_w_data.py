"""SparseGS-W's scenes: made-up strangers and what detectors and stereo see of them, lessons, folders of photographs."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import params as parameters
from common.models.diffusion import Schedule
from common.splatting import SceneError, View, intrinsics, look_at
from papers.sparsegs_w import data, method, photos, phototourism, pretrained, prior
from papers.sparsegs_w.settings import Params

SMALL = {"width": 48, "height": 40, "tests": 2, "points": 200, "steps": 12, "warm": 4, "every": 2, "rounds": 2}


def tiny(**changes) -> Params:
    return dataclasses.replace(parameters.load(Params, "sparsegs_w", "smoke"), **(SMALL | changes))


@pytest.fixture(scope="module")
def case() -> data.Case:
    return data.facade(tiny(), 0)


# ---------------------------------------------------------------------------------------------------------- strangers


def test_light_is_gain_gamma_and_offset():
    lit = photos.Light(torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.0, 0.1, 0.0]))
    found = lit(torch.tensor([[0.25, 0.5, 1.0], [1.0, 1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.35, 0.5], [1.0, 1.0, 0.0]]))
    image = torch.rand(4, 4, 3)
    torch.testing.assert_close(photos.NEUTRAL(image), image)


def test_detectors_miss_and_overshoot_but_find_people():
    found = []
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        crowd = photos.people(72, 96, draw)
        truth = photos.covered(crowd, 72, 96)
        assert 0.02 < float(truth.float().mean()) < 0.5
        found.append(photos.overlap(photos.detected(crowd, 72, 96, draw), truth))
    assert min(row["iou"] for row in found) > 0.4 and max(row["iou"] for row in found) < 0.97
    assert sum(row["recall"] for row in found) / 8 > 0.8
    same = torch.rand(5, 5) > 0.5
    assert photos.overlap(same, same) == {"iou": 1.0, "recall": 1.0}


def test_photographs_differ_from_the_clean_views_by_people_and_light(case: data.Case):
    assert case.clean is not None and case.true_masks is not None and case.lights is not None
    first = case.reference
    free = ~case.true_masks[first.name]
    assert float((first.image - case.clean[first.name])[free].abs().max()) < 2 * photos.TOUCHED  # neutral light
    other = case.scene.train[1]
    assert float((other.image - case.clean[other.name])[~case.true_masks[other.name]].abs().mean()) > 0.01
    assert case.scene.train[0].depth is None and case.scene.test[0].depth is None  # no truth for the arms
    assert not torch.equal(data.facade(tiny(), 1).reference.image, first.image)


def test_stereo_sees_the_people_where_they_stand(case: data.Case):
    assert case.world is not None and case.true_masks is not None
    name = case.reference.name
    depth = case.world.render(case.reference.camera, name, samples=1).depth
    assert depth is not None
    found, crowd = case.maps[name], case.true_masks[name]
    off = (found.depth / depth - 1).abs()
    assert float(off[crowd].median()) > 0.2 and float(found.confidence[crowd].median()) > method.CONFIDENCE
    sure = ~crowd & (found.confidence > method.CONFIDENCE)
    assert float((off[sure] < 0.1).float().mean()) > 0.9 and bool((off[sure] > 0.1).any())  # some outliers pass


def test_lessons_are_bad_and_good_pictures_of_other_scenes():
    pairs = prior.bad_pictures(tiny(), 0)
    assert len(pairs) == 2 and pairs[0][0].shape == pairs[0][1].shape == (3, 40, 48)
    assert all(0.0005 < float((worse - good).square().mean()) < 0.2 for worse, good in pairs)
    draw = torch.Generator().manual_seed(0)
    crops = torch.rand(16, 3, 24, 24, generator=draw)
    spoilt = prior.holes(crops, draw)
    changed = (spoilt != crops).flatten(1).any(dim=1)
    assert 2 < int(changed.sum()) < 14  # half of them, give or take


# ------------------------------------------------------------------------------------------- folders of photographs


def collection(root: Path, *, masks: bool = True, table: bool = True, count: int = 8) -> Path:
    """A made-up PhotoTourism folder: photographs of two sizes, a COLMAP model, masks, NeRF in the wild's table."""
    (root / "sparse").mkdir(parents=True)
    (root / "images").mkdir()
    names = [f"{index:02d}.png" for index in range(count)]
    sizes = [(40, 30) if index % 2 else (24, 36) for index in range(count)]
    body = struct.pack("<Q", count)
    for index, (width, height) in enumerate(sizes):
        body += struct.pack("<IiQQ4d", index + 1, 1, width, height, 30.0, 30.0, width / 2, height / 2)  # PINHOLE
    (root / "sparse/cameras.bin").write_bytes(body)
    body = struct.pack("<Q", count)
    for index, name in enumerate(names):
        body += struct.pack("<I7dI", index + 1, 1, 0, 0, 0, -0.2 * index, 0, 0, index + 1)
        body += name.encode() + b"\0" + struct.pack("<Q", 0)
    (root / "sparse/images.bin").write_bytes(body)
    (root / "sparse/points3D.bin").write_bytes(struct.pack("<Q", 0))
    for index, (name, (width, height)) in enumerate(zip(names, sizes, strict=True)):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
    if masks:
        (root / "masks").mkdir()
        for name, (width, height) in zip(names, sizes, strict=True):
            white = np.zeros((height, width), dtype=np.uint8)
            white[: height // 2] = 255
            Image.fromarray(white).save(root / "masks" / name)
    if table:
        rows = ["filename\tid\tsplit\tdataset"]
        rows += [f"{name}\t{index}\t{'test' if index > 5 else 'train'}\tmade" for index, name in enumerate(names)]
        (root / "made.tsv").write_text("\n".join(rows) + "\n")
    return root


def folder(root: Path, **changes) -> Params:
    return tiny(dataset="phototourism", data_dir=str(root), width=32, height=24, views=3, **changes)


def test_a_collection_is_brought_to_one_size_with_its_masks_and_split(tmp_path: Path):
    scene, masks, masked = phototourism.load(folder(collection(tmp_path)))
    assert [one.name for one in scene.train] == ["00.png", "02.png", "05.png"]
    assert [one.name for one in scene.test] == ["06.png", "07.png"] and masked
    for one in (*scene.train, *scene.test):
        assert one.image.shape == (24, 32, 3) and one.mask is None
    mask = masks["05.png"]  # 40 x 30 scaled to 32 x 24
    assert mask.shape == (24, 32) and bool(mask[:11].all()) and not bool(mask[13:].any())
    upright = masks["00.png"]  # 24 x 36 scaled to 32 x 48, the middle half cut out
    assert bool(upright[:11].all()) and not bool(upright[13:].any())
    assert float(scene.train[0].camera.K[1, 2]) == pytest.approx(12)
    named = phototourism.load(folder(tmp_path, photos=["01.png", "03.png"]))[0]
    assert [one.name for one in named.train] == ["01.png", "03.png"]


def test_without_table_and_masks_every_eighth_tests_and_nothing_is_masked(tmp_path: Path):
    scene, masks, masked = phototourism.load(folder(collection(tmp_path / "dense", masks=False, table=False).parent))
    assert [one.name for one in scene.test] == ["00.png"] and len(scene.train) == 3
    assert not masked and not any(bool(mask.any()) for mask in masks.values())


def test_cropping_keeps_what_the_camera_sees():
    draw = torch.Generator().manual_seed(0)
    wide = look_at((0, -3, 0), (0, 0, 0), (0, 0, 1), intrinsics(40, 20, fov_x_rad=1.0), 40, 20)
    whole = View("a", wide, torch.rand(20, 40, 3, generator=draw))
    part = phototourism.cropped(whole, 20, 20)
    torch.testing.assert_close(part.image, whole.image[:, 10:30])
    point = torch.tensor([0.2, 0.0, 0.1])
    (before, _), (after, _) = wide.project(point), part.camera.project(point)
    torch.testing.assert_close(after, before - torch.tensor([10.0, 0.0]), atol=1e-4, rtol=0)


def test_faults_of_a_collection_are_named_with_the_way_out(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"data_dir is ''.*--set data_dir=FOLDER"):
        phototourism.load(tiny(dataset="phototourism"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no COLMAP model here or in dense/"):
        phototourism.load(folder(tmp_path / "empty"))
    made = collection(tmp_path / "made")
    with pytest.raises(SceneError, match=r"6 training photographs, views asks for 9"):
        phototourism.load(dataclasses.replace(folder(made), views=9))
    (made / "masks/02.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"02\.png: no mask of the photograph 02\.png"):
        phototourism.load(folder(made))
    Image.fromarray(np.zeros((3, 3), dtype=np.uint8)).save(made / "masks/02.png")
    with pytest.raises(SceneError, match="resize the mask"):
        phototourism.load(folder(made))
    (made / "masks/02.png").write_bytes(b"nothing")
    with pytest.raises(SceneError, match="mask cannot be read"):
        phototourism.load(folder(made))
    (made / "made.tsv").write_text("name\n00.png\n")
    with pytest.raises(SceneError, match="columns filename and split"):
        phototourism.load(folder(made))
    (made / "made.tsv").write_text("filename\tsplit\nother.png\ttrain\n")
    with pytest.raises(SceneError, match="another scene's"):
        phototourism.load(folder(made))


# ---------------------------------------------------------------------------------------------- pretrained networks


class Latent:
    """Stands for Stable Diffusion: latents are means over 8 x 8 pixels, and it predicts what is in its condition."""

    schedule = Schedule.cosine()

    @classmethod
    def from_pretrained(cls, model: str, control: str, *, device: str) -> Latent:
        assert model and control and device == "cpu"
        return cls()

    def encode_text(self, prompt: str) -> Tensor:
        return torch.zeros(1, 2, 4)

    def encode(self, image: Tensor) -> Tensor:
        assert float(image.min()) < 0  # -1..1
        return F.avg_pool2d(image, 8)

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z, scale_factor=8.0)

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, condition: Tensor, strength: float) -> Tensor:
        assert strength == 0.7 and float(condition.min()) >= 0  # 0..1
        a = self.schedule.at(t)
        return (x - a.sqrt() * F.avg_pool2d(2 * condition - 1, 8)) / (1 - a).sqrt()


def test_pretrained_networks_paint_and_repair_in_latents(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrained, "StableDiffusion", Latent)
    params = tiny(priors="pretrained", control=0.7)
    mender = prior.mender(params, None, 0)
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(16, 24, 3, generator=draw)
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[2:7, 3:20] = True
    painted = mender.clean("a", image, mask)
    assert torch.equal(painted[~mask], image[~mask]) and not torch.equal(painted[mask], image[mask])
    repaired = mender.enhance(image[None], 0, strength=0.6, reference=None)
    blocks = (F.avg_pool2d(picture.movedim(-1, 0)[None], params.down) for picture in (repaired[0], image))
    torch.testing.assert_close(*blocks, atol=0.02, rtol=0)  # values are kept within 0..1 after the constraint


def test_the_paper_profile_asks_dust3r_about_the_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stereo(views, weights, *, device):
        assert weights.startswith("naver/DUSt3R") and device == "cpu"
        return [(torch.full((24, 32), 2.0), torch.full((24, 32), 5.0)) for _ in views]

    monkeypatch.setattr(pretrained, "dust3r", stereo)
    found = data.case(folder(collection(tmp_path)), 0)
    assert set(found.maps) == set(found.masks) == {"00.png", "02.png", "05.png"}
    assert not found.reference_tests and found.world is None and found.true_masks is None
    assert data.provenance(folder(tmp_path))[0] == "phototourism"
