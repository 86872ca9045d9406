"""What `papers/<slug>/paper.yaml` says about a paper: who, where, which code was read, and where we deviate.

    title: Learning to Distill Global Representation for Sparse-View CT
    authors: Li et al.
    venue: ICCV 2023
    year: 2023
    arxiv: "2308.08463"
    summary: One or two sentences for a reader who does not know the paper.
    code: {url: https://..., commit: 0123abc, licence: none, read: true}        # or a list of them
    status: What of it is measured here, and what is not.
    hardware: 4x RTX 3090
    data: Which data the authors used, and how to come by them.
    cover: reconstructions                     # the figure that stands for the paper; without it the first
    deviations:                                # each a text, or a mapping of short parts
      - {what: image size, paper: 256, here: 128, why: two cores}
    stub: true                                 # only what `resparse new` wrote; remove it with the first claim

Any further key is kept in `more` and shown as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TEXTS = ("title", "authors", "venue", "year", "arxiv", "summary", "status", "hardware", "data", "cover")


class PaperError(ValueError):
    """`paper.yaml` is missing or cannot be read; the message names the file."""


@dataclass(frozen=True)
class Paper:
    """A paper as its folder describes it; texts are empty and lists are empty where nothing is said."""

    slug: str
    title: str
    authors: str = ""
    venue: str = ""
    year: str = ""
    arxiv: str = ""
    summary: str = ""
    status: str = ""
    hardware: str = ""
    data: str = ""
    cover: str = ""
    code: tuple[Mapping[str, Any], ...] = ()
    deviations: tuple[str | Mapping[str, Any], ...] = ()
    stub: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


def load(path: str | Path) -> Paper:
    """Read one `paper.yaml`; the folder names the paper.

    Raises:
        PaperError: the file is missing, is no YAML mapping, or lacks a title.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = Path(path)
    if not path.is_file():
        raise PaperError(f"{path} does not exist, expected the paper's description; `resparse new <slug>` writes one.")
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise PaperError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content.get("title"):
        raise PaperError(f"{path} has no title, expected a mapping with at least 'title: ...'; add it.")
    fields = dict(content)
    texts = {name: _text(fields.pop(name, "")) for name in _TEXTS}
    code, deviations = _listed(fields.pop("code", [])), _listed(fields.pop("deviations", []))
    stub = fields.pop("stub", False)
    if not isinstance(stub, bool):
        raise PaperError(f"{path}: stub got {stub!r}, expected true or false; remove it from a finished paper.")
    return Paper(
        slug=path.resolve().parent.name,
        code=tuple(item if isinstance(item, Mapping) else {"url": str(item)} for item in code),
        deviations=tuple(item if isinstance(item, Mapping) else _text(item) for item in deviations),
        stub=stub,
        more=fields,
        **texts,
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return " ".join(str(value).split())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []
