"""Masked gradients as torch ops: tracing, compiling, what is refused, and what is written in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import masked_grad
from kernels.masked_grad import Moments, Selection


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chosen(shape: tuple[int, ...], density: float = 0.3) -> Selection:
    return Selection.from_mask(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads it
def test_the_ops_keep_their_promises_to_torch() -> None:
    """Shapes and strides for tracing, gradients, no hidden changes, with static and dynamic sizes."""
    ops, check = torch.ops.resparse, torch.library.opcheck
    traced = {"test_utils": ("test_schema", "test_faketensor")}
    selection = chosen((8, 5))
    index = (selection.offsets, selection.starts)
    x, weight, values = noise(3, 5).requires_grad_(), noise(8, 5), noise(selection.count).requires_grad_()
    check(ops.masked_grad_linear.default, (x, weight, values, *index, noise(8).requires_grad_()))
    check(ops.masked_grad_linear_gradient.default, (noise(3, 8), x.detach(), *index, torch.float32), **traced)
    selection = chosen((8, 3, 3, 3))
    index, moves = (selection.offsets, selection.starts), ([2, 1], [1, 1], [1, 2], 2)
    x, weight, values = noise(2, 6, 7, 6).requires_grad_(), noise(8, 3, 3, 3), noise(selection.count).requires_grad_()
    check(ops.masked_grad_conv2d.default, (x, weight, values, *index, None, *moves))
    y, x = F.conv2d(x, weight, None, *moves).detach(), x.detach()
    check(ops.masked_grad_conv2d_gradient.default, (y, x, *index, [3, 3], *moves, torch.float32), **traced)
    others = x.to(memory_format=torch.channels_last), weight.bfloat16(), values.detach()
    check(ops.masked_grad_conv2d.default, (others[0].bfloat16(), *others[1:], *index, None, *moves), **traced)
    state, factors = [noise(selection.count).abs() for _ in range(3)], (0.9, 0.99, 0.999, 0.01, 1.3, 1e-8)
    arguments = (weight.bfloat16(), noise(selection.count), *index, *state, torch.ones(()))
    check(ops.masked_grad_adamw_.default, arguments + factors, **traced)


def test_gradients_are_those_of_differences() -> None:
    """gradcheck in float64. The weight holds the values, so that it is written before every call."""
    selection = chosen((6, 5))
    weight = noise(6, 5, dtype=torch.float64)

    def linear(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        held = selection.scatter_(weight.clone(), values.detach())
        return masked_grad.linear(x, held, values, selection, bias)

    inputs = (noise(4, 5, seed=1), selection.gather(weight), noise(6, seed=2))
    assert torch.autograd.gradcheck(linear, [t.double().requires_grad_() for t in inputs])
    shape = (4, 2, 3, 2)
    window, kernel = chosen(shape), noise(*shape, dtype=torch.float64)

    def conv2d(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        held = window.scatter_(kernel.clone(), values.detach())
        return masked_grad.conv2d(x, held, values, window, bias, (2, 1), (1, 0), (1, 2), 2)

    inputs = (noise(2, 4, 5, 6, seed=1), window.gather(kernel), noise(4, seed=2))
    assert torch.autograd.gradcheck(conv2d, [t.double().requires_grad_() for t in inputs])


def test_compiled_whole() -> None:
    selection, window = chosen((8, 18)), chosen((2, 3, 3, 3))
    weight, kernel = noise(8, 18), noise(2, 3, 3, 3)

    def model(images: Tensor, values: Tensor, others: Tensor) -> Tensor:
        y = masked_grad.conv2d(images, kernel, others, window, padding=1).relu().flatten(1)
        return masked_grad.linear(y, weight, values, selection).square().mean()

    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        leaves = [noise(2, 3, 3, 3).requires_grad_(), masked_grad.handle(selection), masked_grad.handle(window)]
        loss = run(*leaves)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_a_weight_that_changes_before_backward_is_an_error() -> None:
    selection, weight = chosen((6, 5)), noise(6, 5)
    values, state = masked_grad.handle(selection), Moments.zeros(selection)
    changes: list[Callable[[], Any]] = [
        lambda: weight.add_(1),
        lambda: selection.scatter_(weight, torch.zeros(selection.count)),
        lambda: masked_grad.adamw_(weight, torch.ones(selection.count), selection, state, lr=0.1),
    ]
    for change in changes:
        y = masked_grad.linear(noise(3, 5).requires_grad_(), weight, values, selection)
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    # the input of the layer is a constant: no gradient needs the weight
    y = masked_grad.linear(noise(3, 5), weight, values, selection)
    weight.add_(1)
    y.sum().backward()


def test_a_second_derivative_is_refused_and_a_first_one_with_a_graph_is_not() -> None:
    selection, window = chosen((5, 5)), chosen((3, 2, 2, 2))
    values, others = masked_grad.handle(selection), masked_grad.handle(window)
    x, images = noise(3, 5).requires_grad_(), noise(1, 2, 4, 4).requires_grad_()
    cases = (
        (x, values, masked_grad.linear(x, noise(5, 5), values, selection)),
        (images, others, masked_grad.conv2d(images, noise(3, 2, 2, 2), others, window)),
    )
    for leaf, handle, y in cases:
        # linear in the leaf: its gradient depends on the values alone, which autograd cannot see
        slopes = torch.autograd.grad(y.sum(), [leaf, handle], create_graph=True)
        assert all(slope.isfinite().all() for slope in slopes)
        for slope in slopes:
            with pytest.raises(RuntimeError, match="got a gradient of a gradient; expected one differentiation"):
                slope.square().sum().backward(retain_graph=True)


def test_autocast_as_in_torch() -> None:
    selection, weight, bias = chosen((6, 5)), noise(6, 5), noise(6)
    values, x = masked_grad.handle(selection), noise(4, 5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_grad.linear(x, weight, values, selection, bias)
        assert torch.equal(y, F.linear(x, weight, bias))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    assert values.grad is not None and values.grad.dtype == torch.float32
    torch.testing.assert_close(values.grad, x.bfloat16().float().sum(0).expand(6, 5)[selection.mask()])


def test_only_what_is_wanted_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    selection, weight = chosen((6, 5)), noise(6, 5)
    values, x = masked_grad.handle(selection), noise(4, 5)
    y = masked_grad.linear(x.requires_grad_(), weight, values.detach(), selection)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the weight's gradient was computed")

    monkeypatch.setattr(masked_grad.ops, "_linear_gradient", refuse)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 5))


def test_wrong_input_is_refused() -> None:
    selection, weight, x = chosen((6, 5)), noise(6, 5), noise(4, 5)
    values = masked_grad.handle(selection)
    linear, conv2d = masked_grad.linear, masked_grad.conv2d
    with pytest.raises(ValueError, match=r"a weight of \[5, 6\] and a selection of \[6, 5\]"):
        linear(x, noise(5, 6), values, selection)
    with pytest.raises(ValueError, match=r"got x of \[4, 6\]; expected \[\.\.\., 5\]"):
        linear(noise(4, 6), weight, values, selection)
    with pytest.raises(ValueError, match=rf"got values of \[3\]; expected \[{selection.count}\]"):
        linear(x, weight, values[:3], selection)
    with pytest.raises(ValueError, match=r"got a bias of \[5\]; expected \[6\]"):
        linear(x, weight, values, selection, noise(5))
    with pytest.raises(ValueError, match="requires grad, and it would get none"):
        linear(x, weight.clone().requires_grad_(), values, selection)
    with pytest.raises(TypeError, match=r"got x of torch\.float32 and weight of torch\.bfloat16"):
        linear(x, weight.bfloat16(), values, selection)
    with pytest.raises(TypeError, match=r"got x of torch\.float16"):
        linear(x.half(), weight.half(), values, selection)
    with pytest.raises(ValueError, match=r"weight on cpu|weight on meta"):
        linear(x, weight.to("meta"), values, selection)
    window, kernel = chosen((4, 2, 3, 3)), noise(4, 2, 3, 3)
    values = masked_grad.handle(window)
    with pytest.raises(ValueError, match=r"expected x \[N, C, H, W\]"):
        conv2d(noise(1, 3, 8, 8), kernel, values, window)
    with pytest.raises(ValueError, match=r"got groups=3; expected a divisor of O = 4"):
        conv2d(noise(1, 6, 8, 8), kernel, values, window, groups=3)
    with pytest.raises(ValueError, match=r"got images of \[2, 8\], smaller than the window"):
        conv2d(noise(1, 2, 2, 8), kernel, values, window)
    with pytest.raises(ValueError, match="got stride=0; expected one or two integers >= 1"):
        conv2d(noise(1, 2, 8, 8), kernel, values, window, stride=0)
    with pytest.raises(TypeError, match=r"got torch\.float16; expected torch\.float32"):
        masked_grad.handle(window, torch.float16)


def test_the_compiled_module_refuses_what_does_not_fit() -> None:
    from kernels._load import native

    selection = chosen((6, 5))
    index, out, room = (selection.offsets, selection.starts), torch.empty(selection.count), torch.empty(1)
    call = native().masked_grad_linear
    with pytest.raises(ValueError, match="the size of scratch is 1"):
        call(noise(3, 6), noise(3, 5), *index, room, out, 1)
    with pytest.raises(ValueError, match="the number of tokens of x is 2; expected 3"):
        call(noise(3, 6), noise(2, 5), *index, room, out, 1)
    with pytest.raises(ValueError, match="the size of starts is 2; expected 3"):
        call(noise(3, 6), noise(3, 200), *index, room, out, 1)
    with pytest.raises(ValueError, match=r"the last start is \d+; expected 1"):
        call(noise(3, 6), noise(3, 5), selection.offsets[:1], selection.starts, room, out, 1)
