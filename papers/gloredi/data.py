"""The images of the GloReDi experiments, and the triple (I_V, I_2V, I_720) that each of them becomes.

    generated phantoms | head phantom | DeepLesion | AAPM folder  ->  attenuation slices  ->  Simulator -> triples

Slices are attenuation in 1/cm at the networks' side: mu = 0.192 (1 + HU/1000), the authors' scale, in which tissue and
bone lie inside the sigmoid's (0, 1). Lengths are mm, so what is projected is mu / 10.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common import data as datasets
from common import files, tomography
from common.data import ct
from common.tomography import MM_PER_CM, add_photon_noise, fbp_gloredi, gloredi_geometry
from kernels.ct import project
from papers.gloredi.settings import Params

HEAD = "ct_phantom_head_philips"  # as registered
# Slice indices of the head phantom held out for testing, from its middle, and how many on either side go unused: slices
# are 1 mm apart and neighbours look alike.
HEAD_TEST, HEAD_GAP = range(56, 84), 4
PHANTOM_SEEDS = {"train": 0, "test": 1}  # slices of different seeds share nothing
DEEPLESION_OFFSET, DEEPLESION_HU = 32768, (-1024.0, 3072.0)  # 16-bit PNG to HU, and the authors' clip [code]
DEEPLESION_LISTS = {"train": "deeplesion_train_list.txt", "test": "deeplesion_test_list.txt"}
AAPM_SPLIT = {"train": 5410, "test": 526}  # the first and the last of the sorted files [code]

Split = Literal["train", "test"]
T = TypeVar("T")


class Triple(NamedTuple):
    """FBP images [B, 1, H, W] in 1/cm of V, factor x V and all views."""

    sparse: Tensor
    intermediate: Tensor
    target: Tensor


def hu_to_mu(hu: Tensor) -> Tensor:
    """HU -> attenuation in 1/cm; below -1000 HU there is nothing to attenuate, so it is cut at 0."""
    return (MM_PER_CM * tomography.hu_to_mu(hu)).clamp_min(0)


def mu_to_hu(mu: Tensor) -> Tensor:
    """Attenuation in 1/cm -> HU."""
    return tomography.mu_to_hu(mu / MM_PER_CM)


@dataclass(frozen=True)
class Simulator:
    """Turns slices into triples: project to all views, keep every k-th, reconstruct by the authors' FBP.

    `noise_photons` > 0 adds Poisson noise to the sparse and intermediate sinograms as the released code does: the
    sinogram is scaled so that its largest value attenuates by 1/e, far milder than a clinical scan. The target stays
    noise-free.
    """

    size: int
    full_views: int
    noise_photons: float = 0.0

    def sinogram(self, mu: Tensor) -> Tensor:
        """mu [B, 1, H, W] in 1/cm -> line integrals [B, 1, full_views, K], no unit."""
        return project(mu / MM_PER_CM, gloredi_geometry(self.size, self.full_views))

    def subset(self, sinogram: Tensor, views: int) -> Tensor:
        """Every (full_views / views)-th view: [B, 1, full_views, K] -> [B, 1, views, K]."""
        if self.full_views % views:
            raise ValueError(
                f"Simulator: got views={views} with full_views={self.full_views}; expected a divisor, so that "
                f"views are evenly spaced. Choose views such as {_divisors(self.full_views)}."
            )
        return sinogram[..., :: self.full_views // views, :].contiguous()

    def fbp(self, sinogram: Tensor) -> Tensor:
        """The authors' FBP of evenly spaced views: [B, 1, V, K] -> [B, 1, H, W] in 1/cm."""
        return MM_PER_CM * fbp_gloredi(sinogram, gloredi_geometry(self.size, sinogram.shape[-2]))

    def images(self, mu: Tensor, views: Iterable[int], generator: torch.Generator) -> dict[int, Tensor]:
        """FBP images [B, 1, H, W] in 1/cm of mu [B, 1, H, W] by their number of views; all views are always there."""
        clean = self.sinogram(mu)
        measured = add_photon_noise(clean, self.noise_photons, generator) if self.noise_photons else clean
        found = {v: self.fbp(self.subset(measured, v)) for v in sorted(set(views) - {self.full_views})}
        return found | {self.full_views: self.fbp(clean)}


def slices(params: Params, split: Split) -> Sequence[Tensor]:
    """The slices of a split, each [size, size] in 1/cm; folders are read when an item is asked for.

    Raises ValueError where `data_dir` is missing or superfluous, FileNotFoundError for files that are not there.
    """
    wanted = params.train_images if split == "train" else params.test_images
    if params.dataset in ("phantoms", "head_philips") and params.data_dir:
        raise ValueError(
            f"gloredi: got data_dir={params.data_dir!r} with dataset={params.dataset!r}, which needs none; expected an "
            "empty data_dir. Remove it, or set dataset to deeplesion or aapm."
        )
    if params.dataset == "phantoms":
        return _phantoms(params.size, wanted, split)
    if params.dataset == "head_philips":
        return _thin(_head(params.size, split), wanted)
    paths = deeplesion_paths if params.dataset == "deeplesion" else aapm_paths
    return FolderSlices(_thin(paths(_data_dir(params), split), wanted), params.size)


class FolderSlices(Sequence[Tensor]):
    """DeepLesion PNG or AAPM npy files as slices [size, size] in 1/cm, read one by one."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = list(paths), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        path = self.paths[index]
        hu = _read_png(path) if path.suffix == ".png" else _read_npy(path)
        return hu_to_mu(_resize(hu, self.size))


def deeplesion_paths(folder: Path, split: Split) -> list[Path]:
    """The PNG files that the authors' list of the split names, below `folder`; the list lies in `folder` too."""
    listing = folder / DEEPLESION_LISTS[split]
    if not listing.is_file():
        raise FileNotFoundError(
            f"gloredi: {listing} is missing; expected the authors' list of {split} images, one relative path a line. "
            f"Copy src/Data_Provider/{listing.name} of github.com/longzilicart/GloReDi there."
        )
    paths = [folder / line.strip() for line in listing.read_text().splitlines() if line.strip()]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        first = f", the first of them {missing[0]}" if missing else ""
        raise FileNotFoundError(
            f"gloredi: {len(missing)} of the {len(paths)} images in {listing} are missing{first}; expected "
            "DeepLesion's 16-bit PNG files below data_dir (Images_png). Get them from nihcc.app.box.com/v/DeepLesion."
        )
    return paths


def aapm_paths(folder: Path, split: Split) -> list[Path]:
    """AAPM-Mayo slices, one `.npy` in HU each: the first 5,410 by name for training, the last 526 for testing."""
    paths = sorted(folder.glob("*.npy"))
    if len(paths) < sum(AAPM_SPLIT.values()):
        raise FileNotFoundError(
            f"gloredi: {folder} holds {len(paths)} .npy files; expected at least {sum(AAPM_SPLIT.values())}, one "
            "HU slice [H, W] each, named so that sorting keeps patients together. Export them from the AAPM Low Dose "
            "CT set."
        )
    return paths[: AAPM_SPLIT["train"]] if split == "train" else paths[-AAPM_SPLIT["test"] :]


def augment(images: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """[N, H, W] -> [(1 + copies) N, H, W]: each copy turned by any angle and perhaps mirrored, before it is projected.

    Turning the slice and not its FBP image gives new streaks: the views stay where they are.
    """
    made = [images]
    for _ in range(copies):
        angle = 2 * torch.pi * torch.rand(len(images), generator=generator)
        mirror = 1 - 2 * torch.randint(2, (len(images),), generator=generator)
        zeros, cos, sin = torch.zeros(len(images)), angle.cos(), angle.sin()
        rows = torch.stack([mirror * cos, -sin, zeros, mirror * sin, cos, zeros], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(rows, [len(images), 1, *images.shape[1:]], align_corners=False)
        made.append(F.grid_sample(images[:, None], grid, align_corners=False)[:, 0])
    return torch.cat(made)


class TripleSet:
    """Triples of a split, by index and V. Small sets are simulated once and kept, folders batch by batch."""

    def __init__(self, params: Params, split: Split, *, seed: int = 0):
        self.simulator = Simulator(params.size, params.full_views, params.noise_photons)
        self.dataset, self.device, self.factor = params.dataset, params.device, params.teacher_factor
        self.generator = torch.Generator().manual_seed(seed)
        self.slices = slices(params, split)
        self.kept: dict[int, Tensor] | None = None
        if not isinstance(self.slices, FolderSlices):
            images = torch.stack(list(self.slices))
            if split == "train":
                images = augment(images, params.augment, self.generator)
            self.slices = list(images)
            self.kept = self._simulate(images, params.views)

    def __len__(self) -> int:
        return len(self.slices)

    def provenance(self) -> tuple[str, str]:
        """The data set's name and the sha256 of its file, of the generated slices, or of a folder's file names."""
        found = hashlib.sha256()
        if self.dataset == "head_philips":
            return HEAD, files.sha256(_head_file())
        for item in self.slices.paths if isinstance(self.slices, FolderSlices) else self.slices:
            named = isinstance(item, Path)
            found.update(f"{item.name} {item.stat().st_size}\n".encode() if named else item.numpy().tobytes())
        return self.dataset, found.hexdigest()

    def source(self, indices: Sequence[int]) -> Tensor:
        """The slices themselves, [B, 1, H, W] in 1/cm."""
        return torch.stack([self.slices[i] for i in indices])[:, None]

    def sinogram(self, indices: Sequence[int], views: int) -> Tensor:
        """What a scan of `views` views measures of some slices, [B, 1, V, K], without noise; on the run's device."""
        return self.simulator.subset(self.simulator.sinogram(self.source(indices).to(self.device)), views)

    def batch(self, indices: Sequence[int], views: int) -> Triple:
        """The triples of some slices at V = `views`, on the run's device."""
        several = self._several([views])
        if self.kept is not None:
            found = {v: image[list(indices)].to(self.device) for v, image in self.kept.items() if v in several}
        else:
            found = self.simulator.images(self.source(indices).to(self.device), several, self.generator)
        return Triple(found[views], found[several[-2]], found[several[-1]])

    def _several(self, views: Iterable[int]) -> list[int]:
        """The numbers of views to reconstruct from: V, the teacher's factor x V, all."""
        full = self.simulator.full_views
        return [*sorted({n for v in views for n in (v, min(self.factor * v, full))}), full]

    def _simulate(self, images: Tensor, views: Iterable[int], chunk: int = 32) -> dict[int, Tensor]:
        parts = [
            self.simulator.images(part[:, None], self._several(views), self.generator) for part in images.split(chunk)
        ]
        return {v: torch.cat([part[v] for part in parts]) for v in parts[0]}


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` lists of `batch` indices below `count`: one shuffled pass after another, the same for every arm."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch:
            order += torch.randperm(count, generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        yield chosen


def _phantoms(size: int, count: int, split: Split) -> list[Tensor]:
    from common.data import phantoms

    if not count:
        raise ValueError(
            f"gloredi: got {split}_images=0 with dataset='phantoms', expected how many to generate; there is no 'all' "
            f"of generated images. Set {split}_images."
        )
    return list(hu_to_mu(phantoms.generate("head", count, size, seed=PHANTOM_SEEDS[split])))


def _head(size: int, split: Split) -> list[Tensor]:
    volume = ct.npz_volume(_head_file())
    low, high = HEAD_TEST.start - HEAD_GAP, HEAD_TEST.stop + HEAD_GAP
    if split == "test":
        chosen = list(HEAD_TEST)
    else:
        chosen = [z for z in range(len(volume.hu)) if not low <= z < high]
    return [hu_to_mu(_resize(volume.hu[z], size)) for z in chosen]


def _head_file() -> Path:
    return datasets.path(HEAD, only="bone_1mm_256.npz") / "bone_1mm_256.npz"


def _resize(hu: Tensor, size: int) -> Tensor:
    """[H, W] -> [size, size] by area averaging, which keeps mean attenuation and does not alias."""
    if hu.shape[0] != hu.shape[1]:
        raise ValueError(f"gloredi: got a slice of shape {tuple(hu.shape)}; expected a square one. Crop or pad it.")
    if hu.shape[0] == size:
        return hu
    return F.interpolate(hu[None, None], (size, size), mode="area")[0, 0]


def _thin(items: Sequence[T], wanted: int) -> list[T]:
    """`wanted` of the items, evenly spaced; all of them for 0."""
    if wanted > len(items):
        raise ValueError(
            f"gloredi: got {wanted} images wanted, expected at most the {len(items)} there are; ask for fewer, or 0 "
            "for all."
        )
    return list(items) if not wanted else [items[i * len(items) // wanted] for i in range(wanted)]


def _data_dir(params: Params) -> Path:
    folder = Path(params.data_dir).expanduser()
    if not params.data_dir or not folder.is_dir():
        raise FileNotFoundError(
            f"gloredi: got data_dir={params.data_dir!r}; expected the folder of the {params.dataset} images. They are "
            "under their owners' terms and cannot be fetched for you: see papers/gloredi/paper.yaml, then pass "
            "--set data_dir=FOLDER."
        )
    return folder


def _read_png(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        stored = np.asarray(image, dtype=np.float32)
    return (torch.from_numpy(stored) - DEEPLESION_OFFSET).clamp(*DEEPLESION_HU)


def _read_npy(path: Path) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0 and d >= 9)
