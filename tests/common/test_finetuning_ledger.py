from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.finetuning import SaraAdamW, SaraConfig, get_peft_model
from common.finetuning.ledger import Ledger, Tracker, measure
from common.finetuning.methods import attach

WIDE = 128


def tower(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(WIDE, WIDE, bias=False), nn.Tanh())))


def images(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(part for _ in range(layers) for part in (nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Tanh()))
    )


def stepper(model: nn.Module, optimizer: Any, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ledger(model: nn.Module, optimizer: Any, x: Tensor | None = None) -> Ledger:
    return measure(stepper(model, optimizer, torch.ones(8, WIDE) if x is None else x), model, optimizer)


def test_full_fine_tuning_comes_to_what_can_be_counted_by_hand() -> None:
    model = tower(4)
    weights = 4 * WIDE * WIDE * 4
    found = ledger(model, torch.optim.AdamW(model.parameters(), foreach=False))
    assert found.kept["weights"] == weights and found.kept["gradients"] == 0
    steps = 4 * 4  # AdamW's own counters
    assert found.kept["moments"] == 2 * weights + steps
    assert found.peaks["gradients"] == weights
    # the loss's inputs: four products, four tanh; a product is let go when its tanh is there
    activation = 8 * WIDE * 4
    assert 4 * activation <= found.peaks["activations"] <= 6 * activation + 64
    assert found.peak == sum(found.at_peak.values()) and found.allocated is None


def test_a_sparse_step_costs_14_bytes_an_entry_between_and_after_the_passes() -> None:
    model = tower(4)
    optimizer = SaraAdamW(model, fraction=0.05, lr=1e-3)
    count = optimizer.sparse.count
    found = ledger(model, optimizer)
    tiles = 4 * (1 + 1) * 4  # a pointer a tile and one more, of each layer
    assert found.kept["indices"] == 2 * count + tiles
    assert found.kept["moments"] == 8 * count
    assert found.peaks["gradients"] == 4 * count
    assert found.kept["weights"] == 4 * WIDE * WIDE * 4 + 4 * 4, "and one number for each layer's leaf"


def test_an_adapter_keeps_its_base_too() -> None:
    model = get_peft_model(tower(4), SaraConfig(fraction=0.05))
    found = ledger(model, SaraAdamW(model, lr=1e-3))
    assert found.kept["base"] == 4 * model.sparse.count and found.kept["moments"] == 8 * model.sparse.count


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_what_the_backward_pass_takes_does_not_grow_with_the_layers(kind: str) -> None:
    make, x = (tower, torch.ones(8, WIDE)) if kind == "linear" else (images, torch.ones(2, 16, 8, 8))
    sparse, full = {}, {}
    for layers in (2, 12):
        model = make(layers)
        # the same number of entries whatever the depth, so that only the depth differs
        optimizer = SaraAdamW(model, fraction=600 / sum(p.numel() for p in model.parameters()), vectors=False, lr=1e-3)
        found = ledger(model, optimizer, x)
        sparse[layers] = found.peaks["transient"] + found.peaks["gradients"] + found.peaks["update"]
        assert found.peaks["gradients"] == 4 * 600
        model = make(layers)
        found = ledger(model, torch.optim.SGD(model.parameters(), foreach=False), x)
        full[layers] = found.peaks["gradients"]
    layer = make(1)[0].weight.nbytes
    # dense gradients, if they were alive together, would be ten layers more
    assert sparse[12] - sparse[2] < layer / 2
    assert full[12] - full[2] == 10 * layer


def test_the_tracker_sees_dense_gradients_that_are_alive_together() -> None:
    """The fault of scattering values before the forward pass: all dense gradients live until the end."""

    def transient(layers: int, early: bool) -> int:
        x = torch.ones(8, WIDE)
        flat = [torch.zeros(50, requires_grad=True) for _ in range(layers)]
        places = torch.arange(50)
        base = [torch.randn(WIDE * WIDE) / WIDE for _ in range(layers)]

        def scattered(i: int) -> Tensor:
            return base[i].index_put((places,), flat[i]).view(WIDE, WIDE)

        with Tracker() as tracker:
            made = [scattered(i) for i in range(layers)] if early else None
            for i in range(layers):
                x = torch.tanh(x @ (made[i] if made else scattered(i)).T)
            x.sum().backward()
        return tracker.peaks["transient"]

    dense = WIDE * WIDE * 4
    assert transient(8, early=True) - transient(2, early=True) > 5 * dense
    assert transient(8, early=False) - transient(2, early=False) < dense


def test_memory_is_dropped_when_its_last_view_dies_and_moves_between_the_books() -> None:
    with Tracker() as tracker:
        tensor = torch.zeros(100)
        view = tensor[:3].view(3, 1)
        assert tracker.now()["activations"] == 400
        del tensor
        assert tracker.now()["activations"] == 400, "the view holds all of it"
        tracker.enter("weights", [view])
        assert tracker.now()["activations"] == 0 and tracker.now()["weights"] == 400
        del view
        assert tracker.now()["weights"] == 0
        kept = [torch.zeros(10) for _ in range(3)]
        del kept
    assert tracker.peaks["activations"] == 400 and tracker.now()["activations"] == 0
    assert sum(tracker.at_peak.values()) == 400


def allocated(step: Callable[[], None]) -> int:
    """Largest number of bytes that torch's CPU allocator had given out in the step, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, size in moves:
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize("method", ["full", "sara", "lora"])
def test_the_books_agree_with_the_allocator(method: str) -> None:
    made = attach(tower(4), method, lr=1e-3, budget=None if method == "full" else 2000)
    for group in made.optimizer.param_groups:
        group["foreach"] = False
    step = stepper(made.model, made.optimizer, torch.ones(8, WIDE))
    found = measure(step, made.model, made.optimizer)
    between = sum(found.kept.values())
    # the books hold an op's arguments until the op is done; autograd lets one activation go sooner
    slack = 2 * 8 * WIDE * 4 + 256
    assert abs(found.peak - between - allocated(step)) <= slack


def test_a_step_without_a_gradient_is_refused() -> None:
    model = tower(1)
    with pytest.raises(RuntimeError, match="made no gradient"):
        measure(lambda: model(torch.ones(1, WIDE)), model, torch.optim.SGD(model.parameters()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_allocator_has_a_word_too() -> None:
    model = tower(4).cuda()
    optimizer = SaraAdamW(model, fraction=0.05, lr=1e-3)
    found = ledger(model, optimizer, torch.ones(8, WIDE, device="cuda"))
    assert found.allocated is not None
    # blocks are rounded up to 512 bytes, and cuBLAS keeps a workspace
    assert found.allocated >= found.peak - sum(found.kept.values())
