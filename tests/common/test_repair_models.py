"""Models that repair pictures, and the pairs they learn from."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from common.models.corrector import Corrector, correction_loss, train_corrector
from common.models.diffusion import Schedule, sdedit
from common.models.pairs import crop, held_out_error


def stripes(count: int, side: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Good pictures with stripes of random phase and colour; the bad ones are too dark by a third."""
    draw, pairs = torch.Generator().manual_seed(0), []
    for _ in range(count):
        phase, *color = torch.rand(4, generator=draw).tolist()
        wave = 0.5 + 0.5 * torch.sin(torch.arange(side) / 2 + 6 * phase)
        good = torch.tensor(color)[:, None, None] * wave.expand(3, side, side)
        pairs.append((good / 1.5, good))
    return pairs


def test_crops_show_the_same_part_of_both_pictures():
    good = torch.arange(3 * 10 * 12).reshape(3, 10, 12) / 360
    bad, clean = crop([(good / 2, good)], torch.Generator().manual_seed(0), count=6, size=4, device="cpu")
    assert bad.shape == clean.shape == (6, 3, 4, 4)
    torch.testing.assert_close((clean + 1) / 2, bad + 1)  # -1..1, and twice the bad one
    assert len({float(part[0, 0, 0]) for part in clean}) > 1
    across = clean[:, 0, 0, 1] - clean[:, 0, 0, 0]
    assert (across > 0).any() and (across < 0).any()  # some are mirrored
    small, _ = crop([(good, good)], torch.Generator().manual_seed(0), count=1, size=99, device="cpu")
    assert small.shape == (1, 3, 10, 10)


def test_the_error_of_pictures_kept_aside_by_hand():
    pairs = [(torch.zeros(3, 2, 2), torch.full((3, 2, 2), 0.5)), (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2))]
    found = held_out_error(lambda bad: bad + 0.5, pairs)
    assert found == pytest.approx({"before": 0.125, "after": 0.125})
    assert held_out_error(lambda bad: bad + 0.25, pairs)["after"] == pytest.approx(0.0625)


def test_an_untrained_corrector_returns_its_condition():
    torch.manual_seed(0)
    model = Corrector(Schedule.cosine(), width=8)
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    for eta in (0.0, 1.0):
        draw = torch.Generator().manual_seed(1)
        predict = partial(model, condition=image)
        found = sdedit(predict, image, model.schedule, strength=0.6, steps=10, generator=draw, eta=eta, limit=1.0)
        torch.testing.assert_close(found, image, atol=1e-5, rtol=0)


@torch.no_grad()
def test_noise_and_picture_say_the_same():
    torch.manual_seed(0)
    model = Corrector(Schedule.cosine(), width=8)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    x, condition, t = torch.randn(2, 3, 16, 16), torch.rand(2, 3, 16, 16), torch.tensor([100, 700])
    a = model.schedule.at(t)
    state = a.sqrt() * model.picture(x, t, condition) + (1 - a).sqrt() * model(x, t, condition)
    torch.testing.assert_close(state, x, atol=1e-5, rtol=0)
    assert not torch.allclose(model.picture(x, t, condition), condition, atol=1e-2)


def test_the_loss_of_an_untrained_corrector_is_the_error_of_the_bad_picture():
    model = Corrector(Schedule.cosine(), width=8)
    bad, good = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.3)
    loss = correction_loss(model, bad, good, torch.Generator().manual_seed(0))
    assert float(loss.detach()) == pytest.approx(0.09, rel=1e-5)


def test_training_lowers_the_error_of_pictures_it_has_not_seen():
    """A third of the light is missing: that is one factor, and a few steps find most of it."""
    pairs, spoiled = stripes(14), []

    def spoil(bad: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        spoiled.append(len(bad))
        return bad

    options = {"width": 8, "steps": 120, "batch": 4, "size": 16, "learning_rate": 5e-3, "latest": 500}
    trained = train_corrector(pairs[:10], **options, seed=0, spoil=spoil)
    model = trained.network
    assert isinstance(model, Corrector) and spoiled == [4] * 120

    @torch.no_grad()
    def repair(bad: torch.Tensor) -> torch.Tensor:
        image = 2 * bad.movedim(-1, 1) - 1
        draw = torch.Generator().manual_seed(0)
        found = sdedit(partial(model, condition=image), image, model.schedule, strength=0.5, steps=8, generator=draw)
        return (found.movedim(1, -1) + 1) / 2

    error = held_out_error(repair, pairs[10:])
    assert error["after"] < 0.5 * error["before"], error
