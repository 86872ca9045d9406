"""AdamW on chosen entries: against torch.optim.AdamW, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import KernelUnavailable, info, masked_grad
from kernels.bench import other_isas
from kernels.masked_grad import Moments, Selection, reference

ISAS = [info()["isa"], *other_isas(), "emulated512"]
SETTINGS = [
    {"lr": 1e-2, "weight_decay": 0.1},
    {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0},
    {"lr": 1e-3, "betas": (0.0, 0.0)},
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KERNELS_ISA", request.param)
    return request.param


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(shape: tuple[int, ...], density: float = 0.1) -> Selection:
    return Selection.from_mask(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density)


def against_torch(selection: Selection, settings: dict, dtype: torch.dtype, close: float, steps: int = 6) -> None:
    """The chosen entries move as torch moves them in float64, the others not at all."""
    start = noise(*selection.shape).to(dtype)
    weight, state = start.clone(), Moments.zeros(selection, dtype)
    exact = torch.nn.Parameter(selection.gather(start).double())
    optimizer = torch.optim.AdamW([exact], **settings)
    for step in range(steps):
        grad = noise(selection.count, seed=step) * 10.0 ** (step - 3)
        masked_grad.adamw_(weight, grad, selection, state, **settings)
        exact.grad = grad.double()
        optimizer.step()
    assert state.step == steps
    torch.testing.assert_close(selection.gather(weight).double(), exact.detach(), atol=close, rtol=0)
    others = ~selection.mask()
    assert torch.equal(weight[others], start[others])


# a float32 weight of up to 4 is rounded by 2^-23 in each of the steps
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(1, 1), (300, 140), (20, 3, 3, 3), (500,)])
def test_it_is_torch_optim_adamw(shape: tuple[int, ...], settings: dict, isa: str) -> None:
    against_torch(chosen(shape, 1.0 if math.prod(shape) == 1 else 0.1), settings, torch.float32, 3e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_specification_is_torch_optim_adamw(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    against_torch(chosen((30, 20)), settings, torch.float64, 1e-12)
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    against_torch(chosen((30, 20)), settings, torch.float32, 3e-6)
    weight, selection = noise(30, 20).double(), chosen((30, 20))
    state, exact = Moments.zeros(selection, torch.float64), selection.gather(weight)
    given = {"eps": 1e-8, "betas": (0.9, 0.999), "weight_decay": 0.01} | settings
    reference.adamw_(
        weight, torch.ones(selection.count), selection.positions(), state.first, state.second, step=1, **given
    )
    # the first step is lr in the direction of the gradient, beside the decay
    moved = exact * (1 - given["lr"] * given["weight_decay"]) - given["lr"] / (1 + given["eps"])
    torch.testing.assert_close(selection.gather(weight), moved)


def test_a_bfloat16_weight_is_rounded_once_a_step(isa: str) -> None:
    selection, start = chosen((200, 150)), noise(200, 150).bfloat16()
    grad, weight, exact = noise(selection.count, seed=3), start.clone(), start.float()
    masked_grad.adamw_(weight, grad, selection, Moments.zeros(selection), lr=0.1)
    masked_grad.adamw_(exact, grad, selection, Moments.zeros(selection), lr=0.1)
    assert torch.equal(weight, exact.bfloat16())
    # an update below half a unit in the last place is lost, which is what a master is for
    weight = torch.ones(200, 150, dtype=torch.bfloat16)
    masked_grad.adamw_(weight, grad, selection, Moments.zeros(selection), lr=1e-4)
    assert torch.equal(weight, torch.ones_like(weight))


def test_a_master_keeps_what_bfloat16_loses(isa: str) -> None:
    selection = chosen((200, 150))
    weight, exact = torch.ones(200, 150, dtype=torch.bfloat16), torch.ones(200, 150)
    state, other, master = Moments.zeros(selection), Moments.zeros(selection), torch.ones(selection.count)
    for step in range(40):
        grad = noise(selection.count, seed=3) + 0.1 * noise(selection.count, seed=step)
        masked_grad.adamw_(weight, grad, selection, state, lr=1e-4, master=master)
        masked_grad.adamw_(exact, grad, selection, other, lr=1e-4)
    assert torch.equal(master, selection.gather(exact))
    assert torch.equal(weight, exact.bfloat16())
    assert not torch.equal(weight, torch.ones_like(weight))


def test_a_bfloat16_gradient_and_its_scale(isa: str) -> None:
    selection, grad = chosen((40, 50)), noise(200, seed=2)[:1].expand(chosen((40, 50)).count).bfloat16()
    for scale in (0.25, torch.tensor(0.25)):
        one, other = noise(40, 50), noise(40, 50)
        masked_grad.adamw_(one, grad, selection, Moments.zeros(selection), lr=0.1, grad_scale=scale, eps=1.0)
        masked_grad.adamw_(other, grad.float() * 0.25, selection, Moments.zeros(selection), lr=0.1, eps=1.0)
        assert torch.equal(one, other)
        assert not torch.equal(one, noise(40, 50))


def test_nan_stays_where_it_is(isa: str) -> None:
    selection, weight = chosen((40, 50)), noise(40, 50)
    grad = noise(selection.count)
    grad[5] = torch.nan
    for held in (weight, weight.bfloat16()):
        masked_grad.adamw_(held, grad, selection, Moments.zeros(selection), lr=0.1)
        assert selection.gather(held).isnan().nonzero().flatten().tolist() == [5]
        assert int(held.isnan().sum()) == 1


def test_weights_of_any_strides_and_the_same_bits_on_any_number_of_threads() -> None:
    selection = chosen((400, 300), 0.3)  # enough that threads are woken
    grad, found = noise(selection.count), []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weight, turned = noise(400, 300), noise(400, 300).T.contiguous().T
            for held in (weight, turned):
                masked_grad.adamw_(held, grad, selection, Moments.zeros(selection), lr=0.1)
            assert torch.equal(weight, turned)
            found.append(weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nothing_chosen() -> None:
    selection, weight = chosen((4, 5), 0.0), noise(4, 5)
    masked_grad.adamw_(weight, torch.zeros(0), selection, Moments.zeros(selection), lr=0.1)
    assert torch.equal(weight, noise(4, 5))


def test_the_common_norm_is_clipped_as_torch_does_it() -> None:
    leaves = [torch.zeros(n, requires_grad=True) for n in (5, 300)]
    for leaf in leaves:
        leaf.grad = noise(len(leaf), seed=len(leaf))
    grads = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    for limit in (1.0, 1e6):
        scale = masked_grad.clip_scale(grads, limit)
        torch.nn.utils.clip_grad_norm_(leaves, limit)
        for leaf, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(leaf.grad, grad * scale)
            leaf.grad = grad.clone()
    assert float(masked_grad.clip_scale([], 1.0)) == 1
    assert masked_grad.clip_scale([torch.tensor([torch.nan])], 1.0).isnan()
    with pytest.raises(ValueError, match="got max_norm=0"):
        masked_grad.clip_scale(grads, 0)


def test_wrong_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    selection, weight = chosen((6, 5), 0.4), noise(6, 5)
    grad, state = noise(selection.count), Moments.zeros(selection)

    def call(weight: Tensor = weight, grad: Tensor = grad, state: Moments = state, lr: float = 0.1, **others) -> None:
        masked_grad.adamw_(weight, grad, selection, state, lr=lr, **others)

    with pytest.raises(ValueError, match=r"a weight of \[5, 6\] and a selection of \[6, 5\]"):
        call(noise(5, 6))
    with pytest.raises(ValueError, match=r"got grad of \[2\]"):
        call(grad=grad[:2])
    with pytest.raises(ValueError, match=r"got state\.first of \[3\]"):
        call(state=Moments(torch.zeros(3), torch.zeros(3)))
    with pytest.raises(TypeError, match=r"got state\.second of torch\.float64"):
        call(state=Moments(state.first, state.second.double()))
    with pytest.raises(TypeError, match=r"got weight of torch\.float16"):
        call(weight.half())
    with pytest.raises(TypeError, match=r"a master of a weight of torch\.float32"):
        call(master=grad)
    with pytest.raises(ValueError, match="got lr=-1"):
        call(lr=-1)
    with pytest.raises(ValueError, match=r"betas=\(0\.9, 1\.0\)"):
        call(betas=(0.9, 1.0))
    assert state.step == 0 and torch.equal(weight, noise(6, 5)), "a refused step changes nothing"
    monkeypatch.setenv("KERNELS_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelUnavailable, match="expected a float32 tensor on 'cuda'"):
        call()
    assert state.step == 0
