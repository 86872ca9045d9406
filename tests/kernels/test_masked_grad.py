"""Layers that train chosen entries: against dense autograd in float64, on every instruction set and both routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kernels import KernelUnavailable, info, masked_grad
from kernels.bench import other_isas
from kernels.masked_grad import Selection, cpu, reference

ISAS = [info()["isa"], *other_isas(), "emulated512"]
ROUTES = {"entries": 1e9, "panels": -1e9}  # up to which density products of single entries are made
# float32 sums of float32 products against float64: 2^-24 each, growing with the root of at most 5000 of them
CLOSE = 1e-6

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, weight, bias


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "DENSEST", ROUTES[request.param])
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chosen(shape: tuple[int, ...], density: float, seed: int = 1) -> Selection:
    return Selection.from_mask(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density)


def error(found: Tensor | None, exact: Tensor, size: Tensor | None = None) -> float:
    """Relative to `size`, by default the exact result."""
    assert found is not None and found.shape == exact.shape
    norm = (exact if size is None else size).norm()
    return float((found.double() - exact).norm() / norm.clamp(min=1e-30))


def dense_gradients(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx, dW and dbias by autograd in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    y = layer(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy.double()))


def compare(selection: Selection, layer: Layer, ours: Layer, x: Tensor, weight: Tensor, values: Tensor) -> None:
    """Everything that a layer gives, against dense autograd; errors relative to the sums of absolute values."""
    bias = noise(len(weight), seed=3, dtype=x.dtype)
    dy = noise(*layer(x, weight, bias).shape, seed=4, dtype=x.dtype)
    exact = dense_gradients(layer, x, weight, bias, dy)
    sizes = dense_gradients(layer, x.abs(), weight.abs(), bias.abs(), dy.abs())  # every layer is a sum of products
    x, bias = x.clone().requires_grad_(), bias.requires_grad_()
    y = ours(x, weight, bias)
    y.backward(dy)
    # a bfloat16 tensor is rounded once, by 2^-9 of its size
    rounded = CLOSE if x.dtype == torch.float32 else 2**-8
    for found, i in ((y.detach(), 0), (x.grad, 1), (bias.grad, 3)):
        assert error(found, exact[i], sizes[i]) < rounded
    assert values.grad is not None and values.grad.dtype == values.dtype and values.grad.is_contiguous()
    assert error(values.grad, selection.gather(exact[2]), selection.gather(sizes[2])) < CLOSE


def compare_linear(
    rows: int, columns: int, tokens: int, density: float, dtype: torch.dtype = torch.float32, seed: int = 1
) -> None:
    selection = chosen((rows, columns), density, seed)
    values = masked_grad.handle(selection)
    compare(
        selection,
        F.linear,
        lambda x, w, b: masked_grad.linear(x, w, values, selection, b),
        noise(tokens, columns, seed=5, dtype=dtype),
        noise(rows, columns, seed=6, dtype=dtype),
        values,
    )


# rows, columns, tokens: around tiles, strips of rows, bundles of columns, chunks of tokens, and a second block
SIZES = [(1, 1, 1), (7, 5, 3), (128, 128, 128), (129, 127, 130), (33, 300, 260), (40, 1100, 31), (300, 65, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_linear_is_dense_autograd_at_the_chosen_entries(
    size: tuple[int, int, int], dtype: torch.dtype, isa: str
) -> None:
    compare_linear(*size, 0.1 if isa == "emulated512" else 0.3, dtype)


@pytest.mark.parametrize("density", [0.0, 0.006, 0.1, 1.0])
def test_linear_of_any_density_on_both_routes(density: float, route: str) -> None:
    compare_linear(150, 170, 77, density)


def test_the_route_is_chosen_by_density(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = cpu._take
    monkeypatch.setattr(cpu, "_take", lambda *arguments: taken.append(1) or take(*arguments))
    compare_linear(200, 64, 40, 0.05)
    assert not taken
    compare_linear(200, 64, 40, 0.9)
    assert len(taken) == 4  # panels of 64 rows
    compare_linear(200, 64, 40, 0.9, torch.bfloat16)
    assert len(taken) == 4, "a dense product in bfloat16 would round the sums"


WINDOWS = [
    # rows, channels, groups, kernel, stride, padding, dilation, image
    (8, 4, 1, (3, 3), (1, 1), (1, 1), (1, 1), (6, 7)),
    (130, 6, 1, (3, 3), (2, 2), (1, 1), (1, 1), (9, 8)),
    (12, 6, 3, (3, 2), (1, 2), (0, 2), (2, 1), (7, 9)),
    (6, 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), (5, 5)),
    (70, 35, 35, (2, 2), (1, 1), (0, 0), (1, 1), (4, 4)),
    (140, 4, 2, (1, 1), (1, 1), (0, 0), (1, 1), (3, 3)),
    (5, 130, 1, (3, 3), (3, 1), (4, 5), (1, 3), (4, 3)),
    (4, 2, 1, (1, 5), (1, 7), (0, 0), (1, 1), (2, 40)),
]


def compare_conv2d(window: tuple, density: float, images: int = 3, dtype: torch.dtype = torch.float32) -> None:
    rows, channels, groups, kernel, stride, padding, dilation, image = window
    selection = chosen((rows, channels // groups, *kernel), density)
    values = masked_grad.handle(selection)
    moves = (stride, padding, dilation, groups)
    compare(
        selection,
        lambda x, w, b: F.conv2d(x, w, b, *moves),
        lambda x, w, b: masked_grad.conv2d(x, w, values, selection, b, *moves),
        noise(images, channels, *image, seed=5, dtype=dtype),
        noise(*selection.shape, seed=6, dtype=dtype),
        values,
    )


@pytest.mark.parametrize("window", WINDOWS)
def test_conv2d_is_dense_autograd_at_the_chosen_entries(window: tuple, route: str) -> None:
    for density in (0.0, 0.3, 1.0):
        compare_conv2d(window, density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv2d_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for window in WINDOWS[1:4]:
        compare_conv2d(window, 0.3, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_conv2d_of_any_window(data: st.DataObject) -> None:
    groups, kernel = data.draw(st.integers(1, 4)), data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    small = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation = data.draw(small), data.draw(small)
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    image = tuple(side + data.draw(st.integers(0, 6)) for side in least)
    rows, channels = groups * data.draw(st.integers(1, 40)), groups * data.draw(st.integers(1, 5))
    window = (rows, channels, groups, kernel, stride, padding, dilation, image)
    compare_conv2d(window, data.draw(st.sampled_from([0.05, 0.4])), data.draw(st.integers(1, 4)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 300), st.floats(0, 0.4), st.integers(0, 99))
def test_linear_of_any_size(rows: int, columns: int, tokens: int, density: float, seed: int) -> None:
    compare_linear(rows, columns, tokens, density, seed=seed)


def test_padding_in_words() -> None:
    weight, x = noise(4, 2, 3, 5), noise(1, 2, 8, 9)
    selection = chosen((4, 2, 3, 5), 0.5)
    values = masked_grad.handle(selection)
    for word in ("same", "valid"):
        found = masked_grad.conv2d(x, weight, values, selection, padding=word, dilation=2 if word == "same" else 1)
        exact = F.conv2d(x, weight, padding=word, dilation=2 if word == "same" else 1)
        assert torch.equal(found, exact)
    with pytest.raises(ValueError, match="'same' with stride 1"):
        masked_grad.conv2d(x, weight, values, selection, padding="same", stride=2)


def test_batches_of_any_shape_and_none() -> None:
    weight, bias = noise(6, 5).requires_grad_(False), noise(6)
    selection = chosen((6, 5), 0.5)
    values = masked_grad.handle(selection)
    for shape in ((5,), (2, 3, 5), (0, 5), (2, 0, 5)):
        x = noise(*shape).requires_grad_()
        y = masked_grad.linear(x, weight, values, selection, bias)
        assert y.shape == (*shape[:-1], 6)
        slopes = torch.autograd.grad(y.sum(), [x, values])
        assert slopes[0].shape == x.shape
        if not x.numel():
            assert torch.equal(slopes[1], torch.zeros(selection.count))
    images = noise(0, 3, 4, 4).requires_grad_()
    selection = chosen((2, 3, 3, 3), 0.5)
    values = masked_grad.handle(selection)
    y = masked_grad.conv2d(images, noise(2, 3, 3, 3), values, selection)
    assert y.shape == (0, 2, 2, 2)
    assert torch.equal(torch.autograd.grad(y.sum(), values)[0], torch.zeros(selection.count))


def test_any_strides() -> None:
    x, weight = noise(5, 12, 7, seed=2).transpose(0, 2), noise(20, 5, seed=3)  # [7, 12, 5]
    selection = chosen((20, 5), 0.5)
    values = masked_grad.handle(selection)
    dy = noise(20, 12, 7, seed=4).permute(2, 1, 0)
    masked_grad.linear(x, weight, values, selection).backward(dy)
    exact = torch.einsum("abo,abi->oi", dy.double(), x.double())
    assert error(values.grad, selection.gather(exact)) < CLOSE
    images = noise(2, 4, 6, 6).to(memory_format=torch.channels_last)
    kernel = noise(8, 4, 3, 3).to(memory_format=torch.channels_last)
    selection = chosen((8, 4, 3, 3), 0.5)
    values = masked_grad.handle(selection)
    y = masked_grad.conv2d(images, kernel, values, selection)
    (dense,) = torch.autograd.grad(F.conv2d(images, w := kernel.clone().requires_grad_()).square().sum(), w)
    y.square().sum().backward()
    assert error(values.grad, selection.gather(dense.double())) < CLOSE


def test_nan_reaches_what_it_belongs_to_and_nothing_else(isa: str) -> None:
    selection = chosen((40, 50), 0.5)
    values, x = masked_grad.handle(selection), noise(20, 50)
    x[3, 7] = torch.nan
    masked_grad.linear(x, noise(40, 50), values, selection).backward(noise(20, 40, seed=1))
    assert values.grad is not None
    assert torch.equal(values.grad.isnan(), selection.positions() % 50 == 7)


def test_gradients_accumulate() -> None:
    selection = chosen((30, 20), 0.2)
    values, weight = masked_grad.handle(selection), noise(30, 20)
    for seed in (1, 2):
        masked_grad.linear(noise(9, 20, seed=seed), weight, values, selection).sum().backward()
    exact = sum(torch.ones(30, 9).double() @ noise(9, 20, seed=seed).double() for seed in (1, 2))
    assert isinstance(exact, Tensor)
    assert error(values.grad, selection.gather(exact)) < CLOSE


def test_a_layer_used_twice_and_values_with_memory_of_their_own() -> None:
    selection, weight = chosen((20, 20), 0.3), noise(20, 20) / 5
    values, own = masked_grad.handle(selection), torch.full((selection.count,), torch.nan, requires_grad=True)
    for leaf in (values, own):
        x = noise(4, 20)
        masked_grad.linear(masked_grad.linear(x, weight, leaf, selection), weight, leaf, selection).sum().backward()
    dense = weight.double().requires_grad_()
    F.linear(F.linear(noise(4, 20).double(), dense), dense).sum().backward()
    assert dense.grad is not None and own.grad is not None and values.grad is not None
    assert error(values.grad, selection.gather(dense.grad)) < CLOSE
    assert torch.equal(own.grad, values.grad), "what the values hold is not read"


def test_the_same_bits_on_any_number_of_threads(threads: None, isa: str) -> None:
    # large enough that threads are woken, also in the emulation
    linear, conv = chosen((100, 150), 0.1), chosen((64, 8, 3, 3), 0.1)
    grouped = chosen((64, 2, 3, 3), 0.1)
    window = masked_grad.ops.Window((3, 3), (1, 1), (1, 1), (1, 1), 1)
    factors = noise(200, 100), noise(200, 150, seed=1)
    images = noise(3, 64, 12, 12), noise(3, 8, 12, 12, seed=1)
    found = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        found.append((
            cpu.linear_gradient(*factors, linear.offsets, linear.starts),
            cpu.conv2d_gradient(*images, conv.offsets, conv.starts, window),
            cpu.conv2d_gradient(*images, grouped.offsets, grouped.starts, window._replace(groups=4)),
        ))  # fmt: skip
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_float64_runs_the_specification_and_backends_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    selection, x, weight = chosen((9, 8), 0.4), noise(5, 8), noise(9, 8)
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    values = masked_grad.handle(selection)
    masked_grad.linear(x, weight, values, selection).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, reference.linear_gradient(torch.ones(5, 9), x, selection.positions()))
    monkeypatch.setenv("KERNELS_BACKEND", "cpu")
    values = masked_grad.handle(selection, torch.float64)
    with pytest.raises(KernelUnavailable, match="expected a float32 tensor on 'cpu'"):
        masked_grad.linear(x.double(), weight.double(), values, selection)


def test_the_specification_is_autograd_of_a_weight_made_of_its_entries() -> None:
    selection, x, weight = chosen((9, 8), 0.4), noise(5, 8).double(), noise(9, 8).double()
    values = selection.gather(weight).requires_grad_()
    assert torch.equal(reference.linear(x, weight, values, selection.positions()), F.linear(x, weight))
    assert torch.autograd.gradcheck(lambda v: reference.linear(x, weight, v, selection.positions()), values)
    selection, x, weight = chosen((4, 3, 2, 2), 0.4), noise(2, 3, 4, 4).double(), noise(4, 3, 2, 2).double()
    values = selection.gather(weight).requires_grad_()
    (slope,) = torch.autograd.grad(reference.conv2d(x, weight, values, selection.positions()).sum(), values)
    ours = masked_grad.handle(selection, torch.float64)
    masked_grad.conv2d(x, weight, ours, selection).sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, slope)
