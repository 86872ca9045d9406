"""Bytes of tensors, counted storage by storage."""

from __future__ import annotations

import torch

from common.metrics.memory import StorageTracker

KIB = 256  # float32 of a kibibyte


def test_it_counts_what_is_made_until_it_is_let_go() -> None:
    given = torch.zeros(KIB)
    with StorageTracker() as tracker:
        one = given + 1
        view = one.view(16, 16)[3:]
        assert tracker.live == 1024, "a view is no new memory"
        two = one * 2
        del one
        assert tracker.live == 2048, "a view keeps the storage alive"
        del view
        assert tracker.live == 1024
        two.add_(1)
        given.mul_(2)
        assert tracker.live == 1024, "neither is what is written in place, nor what was there before"
        del two
    assert (tracker.live, tracker.peak) == (0, 2048)


def test_what_outlives_it_is_still_counted_off() -> None:
    with StorageTracker() as tracker:
        kept = torch.zeros(KIB)
    assert tracker.live == 1024
    del kept
    assert tracker.live == 0
    tracker.reset_peak()
    assert tracker.peak == 0


def test_what_autograd_saves_counts_and_goes_with_the_graph() -> None:
    leaf = torch.ones(KIB, requires_grad=True)
    with StorageTracker() as tracker:
        loss = leaf.exp().sum()  # exp saves its result
        assert tracker.live == 1024 + 4
        loss.backward()
        del loss
        assert tracker.live == 1024  # the gradient
    assert tracker.peak >= 2 * 1024


def test_our_own_operators_are_looked_into() -> None:
    from kernels import masked_grad

    weight, x = torch.randn(64, 64), torch.randn(10, 64)
    selection = masked_grad.Selection.from_mask(torch.ones(64, 64) > 0.5)
    values = masked_grad.handle(selection)
    y = masked_grad.linear(x, weight, values, selection).sum()
    with StorageTracker() as tracker:
        y.backward()
    # every entry is chosen: the gradient, and a dense panel of all 64 rows inside the operator
    assert tracker.live == 64 * 64 * 4
    assert tracker.peak >= 2 * 64 * 64 * 4
