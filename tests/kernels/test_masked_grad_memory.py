"""What training of chosen entries holds in memory, counted storage by storage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.metrics.memory import StorageTracker
from kernels import masked_grad
from kernels.masked_grad import Moments, Selection

WIDTH, TOKENS = 512, 40
PANEL = 128 * WIDTH * 4  # bytes: columns of the input, transposed, for 128 tokens; a dense panel of 64 rows has half
STRIPS = 32 * 128 * 4  # of one thread
SMALL = 4096  # losses, scales, and the like


class Stack:
    """Layers of one size, their chosen entries, and all that training keeps of these."""

    def __init__(self, layers: int, density: float = 0.02) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(layers)]
        self.inputs = torch.randn(TOKENS, WIDTH, generator=generator)
        self.selections = [
            Selection.from_mask(torch.rand(WIDTH, WIDTH, generator=generator) < density) for _ in range(layers)
        ]
        self.chosen = sum(selection.count for selection in self.selections)

    def prepare(self) -> None:
        self.values = [masked_grad.handle(selection) for selection in self.selections]
        self.moments = [Moments.zeros(selection) for selection in self.selections]

    def forward(self) -> Tensor:
        x = self.inputs
        for weight, values, selection in zip(self.weights, self.values, self.selections, strict=True):
            x = masked_grad.linear(x, weight, values, selection)
        return x.square().mean()

    def update(self) -> None:
        for weight, values, selection, state in zip(
            self.weights, self.values, self.selections, self.moments, strict=True
        ):
            assert values.grad is not None
            masked_grad.adamw_(weight, values.grad, selection, state, lr=1e-3)


def measured(layers: int, density: float = 0.02) -> tuple[int, int, Stack]:
    """What stays after a step but for the index, the most that backward holds beside it, and the stack.

    The graph is retained, so that activations, which any training keeps, are there from the first to the last layer.
    """
    stack = Stack(layers, density)
    with StorageTracker() as tracker:
        stack.prepare()
        loss = stack.forward()
        before = tracker.live
        tracker.reset_peak()
        loss.backward(retain_graph=True)
        stack.update()
        beside = tracker.peak - before - 4 * stack.chosen
        del loss
        return tracker.live, beside, stack


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("density", [0.006, 0.02, 0.6])
def test_sixteen_bytes_a_chosen_weight_and_a_panel(density: float) -> None:
    live, beside, stack = measured(4, density)
    assert live == 12 * stack.chosen + 4 * 4  # gradients and moments; a handle is one number
    index = sum(selection.nbytes for selection in stack.selections)
    assert index == 2 * stack.chosen + 4 * 4 * (4 * 4 + 1)
    flow = 2 * TOKENS * WIDTH * 4  # gradients of a layer's output and input
    assert beside <= PANEL + STRIPS + flow + SMALL
    assert index + live + beside - flow <= 16 * stack.chosen + PANEL + STRIPS + SMALL


def test_backward_needs_no_more_for_more_layers() -> None:
    beside = [measured(layers)[1] for layers in (2, 5, 9)]
    # layers differ by some chosen entries, and the last to be computed adds to what is there
    assert max(beside) - min(beside) <= SMALL, beside


def test_the_tracker_sees_what_dense_layers_hold() -> None:
    """The same stack in plain torch: its dense gradients are seen, so the test above can fail."""
    stack = Stack(4)
    with StorageTracker() as tracker:
        x, weights = stack.inputs, [weight.clone().requires_grad_() for weight in stack.weights]
        for weight in weights:
            x = F.linear(x, weight)
        loss = x.square().mean()
        before = tracker.live
        tracker.reset_peak()
        loss.backward()
        assert tracker.peak - before >= 3.8 * WIDTH * WIDTH * 4  # activations are freed meanwhile
        before = tracker.live
        stack.prepare()
        assert tracker.live - before == 8 * stack.chosen + 4 * 4  # an index that is there already is not copied


def test_a_convolution_never_holds_its_dense_gradient() -> None:
    rows, channels = 256, 64
    weight, x = torch.randn(rows, channels, 3, 3), torch.randn(2, channels, 8, 8)
    for density in (0.01, 0.9):
        selection = Selection.from_mask(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < density)
        values = masked_grad.handle(selection)
        y = masked_grad.conv2d(x, weight, values, selection, padding=1)
        dy = torch.randn_like(y)
        with StorageTracker() as tracker:
            y.backward(dy)
        columns = weight[0].numel()
        panel = max(128 * 4 * min(columns, 1024), 64 * 4 * columns)
        assert tracker.peak <= 4 * selection.count + panel + STRIPS + dy.nbytes, density
        assert tracker.peak < 4 * selection.count + weight.nbytes
