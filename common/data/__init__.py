"""Data sets by name: registry, cache, mirror folders, checked downloads; loaders and phantoms in the modules beside.

    from common import data
    folder = data.path("ct_phantom_head_philips")     # a folder with verified files
    volume = data.ct.npz_volume(folder / "bone_1mm_256.npz")

`path` looks in the cache (RESPARSE_CACHE, or the platform's cache folder), then in the folders of RESPARSE_DATA_MIRROR
(a list; each has one subfolder a set, used in place, never written to), then downloads into the cache. Every file is
checked by size each time and by sha256 once; nothing half-written or wrong is left under its name.
"""

from common.data import ct, phantoms
from common.data._download import ChecksumError, DataError, DiskFull, DownloadError
from common.data._registry import DataFile, Dataset, UnknownDataset, describe, registry
from common.data._store import MissingData, cache_folder, fetch, locate, mirror_folders, path

__all__ = [
    "ChecksumError",
    "DataError",
    "DataFile",
    "Dataset",
    "DiskFull",
    "DownloadError",
    "MissingData",
    "UnknownDataset",
    "cache_folder",
    "ct",
    "describe",
    "fetch",
    "locate",
    "mirror_folders",
    "path",
    "phantoms",
    "registry",
]
