"""paper.yaml: what is read, and what is told when it cannot be."""

from __future__ import annotations

import pytest

from common import paper


def write(folder, text):
    path = folder / "toy" / "paper.yaml"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_parts_are_read_in_either_form_and_nothing_is_dropped(tmp_path):
    got = paper.load(
        write(tmp_path, "title: A\nauthors: [B, C]\narxiv: 2301.00001\ncode: https://x\ndeviations: one\nmood: calm\n")
    )
    assert (got.slug, got.title, got.authors) == ("toy", "A", "B, C")
    assert got.code == ({"url": "https://x"},) and got.deviations == ("one",)
    assert got.more == {"mood": "calm"} and not got.stub


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no title"),
        ("title: ''", "no title"),
        ("- a", "no title"),
        ("a: [", "not YAML"),
        ("title: A\nstub: 1", "stub"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, text, told):
    with pytest.raises(paper.PaperError, match=told):
        paper.load(write(tmp_path, text))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(paper.PaperError, match="does not exist"):
        paper.load(tmp_path / "paper.yaml")
