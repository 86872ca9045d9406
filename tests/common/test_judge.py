"""The classifier that judges generated images: what it sees, what it scores, and how its training is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import shapes
from common.data.captioned import CLASS, SHAPES, style_set
from common.data.styles import STYLES
from common.metrics import judge as judges
from common.metrics.distribution import frechet
from common.metrics.judge import LOOKS, Judge


class Oracle(nn.Module):
    """Stands in for the network: reads the labels [style, content ...] that the first pixels of an image hold."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.sizes = sizes

    def forward(self, images: Tensor) -> Tensor:
        labels = images[:, 0, 0, : len(self.sizes)].long()
        return torch.cat([F.one_hot(x, n).float() for x, n in zip(labels.unbind(1), self.sizes, strict=True)], 1)


def written(style: Tensor, content: Tensor) -> Tensor:
    images = torch.zeros(len(style), 3, 8, 8)
    images[:, 0, 0, : 1 + content.shape[1]] = torch.cat([style[:, None], content], 1).float()
    return images


def test_scores_are_shares_of_what_was_asked():
    judge = Judge(SHAPES, depth=8)
    judge.network = Oracle(judge.sizes)
    shown = torch.tensor([[0, 1, 2], [1, 3, 0], [1, 1, 1], [0, 0, 0]])
    images = written(torch.tensor([1, 1, 0, 3]), shown)
    assert judge.content_score(images, shown) == 1
    asked = shown.clone()
    asked[0, 0], asked[2, 1] = 1, 0
    assert judge.content_score(images, asked) == pytest.approx(10 / 12)
    for style, share in (("", 0.25), ("barbie", 0.5), (LOOKS[3], 0.25), ("hornify", 0)):
        assert judge.style_score(images, style) == share
    many = images.repeat(200, 1, 1, 1)  # more than it takes at a time
    assert judge.content_score(many, asked.repeat(200, 1)) == pytest.approx(10 / 12)


def test_features_are_those_before_the_last_layer():
    torch.manual_seed(0)
    judge, images = Judge(CLASS, depth=8), torch.rand(300, 3, 16, 16)
    features = judge.features(images)
    assert features.shape == (300, 64) and not features.requires_grad
    logits = torch.cat(judge(images), dim=1)
    assert [x.shape[1] for x in judge(images)] == [6, 10]
    torch.testing.assert_close(judge.network.head(features), logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(judge.features(images[:7]), features[:7], atol=1e-5, rtol=1e-4)


def test_a_judge_refuses_what_it_cannot_judge():
    judge, images = Judge(CLASS, depth=8), torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"content \[2\] for 2 images; expected \[2, 1\]: class"):
        judge.content_score(images, torch.zeros(2))
    with pytest.raises(ValueError, match="expected one of barbie"):
        judge.style_score(images, "baroque")
    with pytest.raises(ValueError, match="N >= 1"):
        judge.features(images[:0])
    with pytest.raises(RuntimeError, match=r"\.eval\(\)"):
        judge.train().features(images)


def test_a_short_training_sees_styles_in_its_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sixty steps are enough to name styles and colours; the hash in the report is the file's, read or made."""
    (tmp_path / "papers").mkdir()
    (tmp_path / "dvc.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    short = replace(judges.RECIPES["judge-shapes"], steps=60, batch=48, count=400)
    monkeypatch.setitem(judges.RECIPES, "judge-shapes", short)
    judge, again = judges.trained("judge-shapes"), judges.trained("judge-shapes")
    assert judge.sha256 == again.sha256 and judge.sha256[:12] in judge.about()
    assert "not standard FID; not comparable with published values" in judge.about()

    pool = shapes.shapes(900, seed=11)
    assert torch.equal(judge.features(pool.images[:8]), again.features(pool.images[:8]))
    sets = {"": pool[torch.arange(300)]} | {style: style_set(style, pool, held_out=300)[1] for style in STYLES}
    assert all(judge.style_score(found.images, style) > 0.8 for style, found in sets.items())  # by chance 1/6
    plain = sets[""]
    assert judge.content_score(plain.images, plain.content) > 0.5  # by chance 1/3
    features = {style: judge.features(found.images) for style, found in sets.items()}
    for style, found in features.items():
        floor = frechet(found[:150], found[150:])
        others = [frechet(found[:150], other[150:]) for name, other in features.items() if name != style]
        assert min(others) > 3 * floor, style


def test_batches_hold_each_image_in_the_style_that_their_labels_say():
    data = shapes.shapes(40, seed=0)
    recipe = replace(judges.RECIPES["judge-shapes"], batch=40, steps=1)
    (images, labels), *_ = judges._batches(data, recipe, torch.Generator().manual_seed(0))
    assert images.shape == (40, 3, 16, 16) and labels.shape == (40, 4) and set(labels[:, 0].tolist()) == set(range(6))
    bright = (images + 1).mean((1, 2, 3))
    hornify = labels[:, 0] == LOOKS.index("hornify")  # a negative: the dark ground becomes bright
    assert bright[hornify].min() > bright[labels[:, 0] == 0].max()
    asked = {tuple(row) for row in data.content.tolist()}
    assert {tuple(row) for row in labels[:, 1:].tolist()} == asked
