from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from common.finetuning import SaraAdamW, SaraConfig, get_peft_model, learning_rate, nuclear_norm, subgradient
from common.finetuning.selecting import Sparse
from common.training import NonFiniteError, Schedule, fit
from kernels.masked_grad import Selection


def network() -> nn.Sequential:
    """Every kind of layer that is served, and some that are not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular", groups=2),
        nn.Flatten(),
        nn.Linear(128, 24),
        nn.SiLU(),
        nn.Linear(24, 5),
    )


def batch(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_training_is_dense_autograd_with_a_mask_and_torchs_adamw(clip: float | None) -> None:
    model, dense = network(), network()
    optimizer = SaraAdamW(model, fraction=0.1, lr=1e-2, weight_decay=0.3)
    masks = {e.name: e.selection.mask() for e in optimizer.sparse.entries}
    assert any(mask.any() for name, mask in masks.items() if "bias" in name)
    # torch's AdamW decays whole tensors; the chosen entries are decayed by hand
    plain = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0)
    start = values(dense)
    for step in range(6):
        for network_, optimizer_ in ((model, optimizer), (dense, plain)):
            optimizer_.zero_grad()
            for micro in range(2):  # accumulated
                (loss_of(network_, batch(2 * step + micro)) / 2).backward()
        for name, parameter in dense.named_parameters():
            parameter.grad *= masks[name]
        if clip:
            norms = [nn.utils.clip_grad_norm_(m.parameters(), clip) for m in (model, dense)]
            torch.testing.assert_close(*norms)
            assert norms[0] > clip, "it does clip"
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter[masks[name]] *= 1 - 1e-2 * 0.3
        optimizer.step()
        plain.step()
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
        same = model.state_dict()[name] == start[name]
        assert bool(same[~masks[name]].all()) and not bool(same[masks[name]].any())


def test_names_and_plain_layers_stay_what_they_were() -> None:
    model = network()
    optimizer = SaraAdamW(model, threshold=5e-3)
    assert list(model.state_dict()) == list(network().state_dict())
    model.load_state_dict(network().state_dict())
    assert isinstance(model[0], nn.Conv2d) and "trains" in repr(model[0])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 1 and p.stride() == (0,))
    assert trained == sum(e.selection.count for e in optimizer.sparse.entries if e.parameter.ndim > 1)
    train(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    loss_of(twin, batch()).backward()
    assert twin[0].entries is not model[0].entries and twin[0].entries.parameter is twin[0].weight
    assert twin[0].chosen.grad is not None
    trained_values = values(model)
    optimizer.sparse.release()
    assert type(model[0]) is nn.Conv2d and type(model[7]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters()) and len(list(model.parameters())) == 10
    assert all(torch.equal(value, trained_values[name]) for name, value in values(model).items())


def test_the_learning_rate_follows_the_papers_rule() -> None:
    for theta, printed in ((2e-4, 9.3e-4), (8e-4, 7.6e-4), (2e-3, 5.0e-4), (5e-3, 1.7e-4), (1e-2, 3.0e-5)):
        assert learning_rate(theta) == pytest.approx(printed, rel=0.03)  # printed with two digits
    assert SaraAdamW(network(), threshold=5e-3).param_groups[0]["lr"] == learning_rate(5e-3)
    by_fraction = SaraAdamW(network(), fraction=0.05)
    assert by_fraction.param_groups[0]["lr"] == learning_rate(by_fraction.sparse.theta)
    with pytest.raises(ValueError, match="expected an lr, such as 1e-4"):
        SaraAdamW(network(), fraction=0.05, select="random")


def test_schedulers_and_the_houses_loop_drive_it() -> None:
    model = network()
    optimizer = SaraAdamW(model, fraction=0.2, lr=2e-2)
    losses = fit(model, (batch(0) for _ in range(40)), loss_of, optimizer, Schedule(40, 5), clip=1.0)
    assert losses[-1] < losses[0] / 2
    assert optimizer.param_groups[0]["lr"] < 1e-3


@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_goes_on_bit_for_bit(adjusted: bool, dtype: torch.dtype, tmp_path) -> None:
    def fresh() -> tuple[nn.Module, SaraAdamW]:
        model = network().to(dtype)
        more = {"total_steps": 6} if adjusted else {}
        return model, SaraAdamW(model, fraction=0.3, lr=2e-2, lambda_rank=1e-3, seed=3, **more)

    def run(model: nn.Module, optimizer: SaraAdamW, steps: range) -> None:
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step), -1)
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, batch(step).to(dtype)).backward()
            optimizer.step()
            rates.step()

    model, optimizer = fresh()
    run(model, optimizer, range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    run(model, optimizer, range(4, 8))
    for weights_first in (True, False):  # entries chosen of trained weights are put right by the state
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        again = network().to(dtype)
        if weights_first:
            again.load_state_dict(state["model"])
        more = {"total_steps": 6} if adjusted else {}
        resumed = SaraAdamW(again, fraction=0.3, lr=2e-2, lambda_rank=1e-3, seed=3, **more)
        again.load_state_dict(state["model"])
        resumed.load_state_dict(state["optimizer"])
        run(again, resumed, range(4, 8))
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        assert resumed.steps == 8 and resumed.sparse.count == optimizer.sparse.count


def test_a_state_of_another_model_is_refused() -> None:
    state = SaraAdamW(network()[:4], fraction=0.1).state_dict()
    with pytest.raises(ValueError, match=r"state of 6 parameters, the model has 10; expected .* only in one of them: "):
        SaraAdamW(network(), fraction=0.1).load_state_dict(state)


def test_halfway_only_what_is_still_small_is_trained_on() -> None:
    model = network()
    optimizer = SaraAdamW(model, fraction=0.2, lr=2e-3, total_steps=8)
    chosen = {e.name: e.chosen.mask() for e in optimizer.sparse.entries}
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
    before = optimizer.sparse.count
    optimizer.zero_grad()
    loss_of(model, batch(3)).backward()
    expected = {}
    for entries in optimizer.sparse.entries:
        if entries.leaf in optimizer.state and entries.selection.count:
            step = 0.9 * optimizer.state[entries.leaf]["first"] + 0.1 * entries.gradient()
            expected[entries.name] = entries.selection.scatter_(torch.zeros(entries.weight.shape), step)
    optimizer.step()  # the fourth of eight
    halfway = values(model)
    assert 0 < optimizer.sparse.count < before
    for entries in optimizer.sparse.entries:
        small = chosen[entries.name] & (halfway[entries.name].abs() < optimizer.sparse.theta)
        assert torch.equal(entries.selection.mask(), small)
        if entries.selection.count:
            state = optimizer.state[entries.leaf]
            assert state["step"] == 4
            torch.testing.assert_close(state["first"], entries.selection.gather(expected[entries.name]))
    train(model, optimizer, range(4, 8))
    for entries in optimizer.sparse.entries:
        trained = entries.selection.mask()
        now = model.state_dict()[entries.name]
        assert torch.equal(now[~trained], halfway[entries.name][~trained])
        assert bool((now != halfway[entries.name])[trained].all())


def test_where_nothing_stays_small_all_are_trained_on() -> None:
    model = network()
    optimizer = SaraAdamW(model, fraction=0.05, lr=1.0, total_steps=4)
    before = optimizer.sparse.count
    with pytest.warns(UserWarning, match="no chosen entry is below"):
        train(model, optimizer, range(3))
    assert optimizer.sparse.count == before


@pytest.mark.parametrize("total", [1, None])
def test_an_adjustment_without_a_middle_is_refused(total: int | None) -> None:
    with pytest.raises(ValueError, match="progressive_at"):
        SaraAdamW(network(), fraction=0.1, progressive_at=0.5, total_steps=total)


def test_the_subgradient_is_that_of_the_nuclear_norm() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 6, 2, dtype=torch.float64)
    selection = Selection.from_mask(torch.rand(9, 6, 2) < 0.6)
    leaf = (weight * selection.mask()).flatten(1).requires_grad_()
    norm = torch.linalg.matrix_norm(leaf, "nuc")
    norm.backward()
    torch.testing.assert_close(subgradient(weight, selection), selection.gather(leaf.grad.view(weight.shape)))
    assert nuclear_norm(weight, selection) == pytest.approx(norm.item())
    # of rank two: directions without a size have no say, so the norm of U V^T is the root of the rank
    low = (torch.randn(9, 2, dtype=torch.float64) @ torch.randn(2, 12, dtype=torch.float64)).view(9, 6, 2)
    whole = Selection.from_mask(torch.ones(9, 6, 2, dtype=torch.bool))
    assert float(subgradient(low, whole).norm()) == pytest.approx(math.sqrt(2))
    assert not subgradient(torch.zeros(4, 4), Selection.from_mask(torch.eye(4) > 0)).any()


def norm_of(sparse: Sparse) -> float:
    return sum(nuclear_norm(e.weight, e.selection) for e in sparse.entries if e.parameter.ndim > 1)


@pytest.mark.parametrize("matrices", ["one", "all"])
def test_the_low_rank_term_changes_weights_and_lowers_the_norm(matrices) -> None:
    ends = {}
    for factor in (0.0, 0.3):
        model = network()
        optimizer = SaraAdamW(
            model, fraction=0.3, lr=2e-3, weight_decay=0, lambda_rank=factor, rank_matrices=matrices, seed=1
        )
        start = norm_of(optimizer.sparse)
        train(model, optimizer, range(30))
        ends[factor] = (values(model), norm_of(optimizer.sparse))
    assert any(not torch.equal(ends[0.0][0][name], value) for name, value in ends[0.3][0].items())
    assert ends[0.3][1] < min(start, ends[0.0][1])


def test_one_matrix_is_drawn_each_step_and_it_changes() -> None:
    model = network()
    optimizer = SaraAdamW(model, fraction=0.3, lr=1e-3, lambda_rank=1e-3)
    loss_of(model, batch()).backward()
    drawn = []
    for step in range(20):
        optimizer.steps = step
        found = optimizer._low_rank()
        assert len(found) == 1 and found[0].parameter.ndim > 1
        drawn.append(found[0].name)
    assert set(drawn) == {"0.weight", "3.weight", "5.weight", "7.weight"}


def test_bfloat16_weights_move_by_less_than_their_rounding() -> None:
    # a step of 1e-5 is lost in a bfloat16 weight above 0.004; the master adds it up
    model = nn.Linear(16, 16).bfloat16()
    optimizer = SaraAdamW(model, fraction=0.5, select="largest", vectors=False, lr=1e-5, weight_decay=0)
    start = values(model)["weight"].float()
    for _ in range(200):
        optimizer.zero_grad()
        model(torch.ones(2, 16, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    (entries,) = [e for e in optimizer.sparse.entries]
    master = optimizer.state[entries.leaf]["master"]
    moved = entries.selection.gather(start) - master
    torch.testing.assert_close(moved, torch.full_like(moved, 200 * 1e-5), rtol=0.01, atol=1e-6)  # Adam of a fixed sign
    assert torch.equal(entries.selection.gather(entries.weight), master.bfloat16())


def test_under_autocast_it_trains_float32_weights() -> None:
    model = network()
    optimizer = SaraAdamW(model, fraction=0.2, lr=2e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(e.leaf.dtype == torch.float32 for e in optimizer.sparse.entries)


@pytest.mark.parametrize("where", ["layer", "bias"])
def test_a_loss_that_is_not_finite_leaves_the_last_good_state(where: str) -> None:
    model = network()
    optimizer = SaraAdamW(model, fraction=0.2, lr=1e-3)
    train(model, optimizer, range(3))
    good = values(model)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    loss_of(model, batch()).backward()
    trained = [e for e in optimizer.sparse.entries if e.selection.count]
    entries = next(e for e in trained if (e.parameter.ndim == 1) == (where == "bias"))
    entries.leaf.grad[-1 if where == "layer" else int(entries.selection.positions()[0])] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"gradient of '{entries.name}' is not finite in step 4.*after 3 steps"):
        optimizer.step()
    assert all(torch.equal(value, good[name]) for name, value in values(model).items())
    after = optimizer.state_dict()
    assert after["steps"] == 3
    for index, state in before["state"].items():
        assert all(torch.equal(state[key], after["state"][index][key]) for key in ("first", "second"))
    train(model, optimizer, range(3, 5))
    assert all(bool(value.isfinite().all()) for value in values(model).values())


def test_a_model_that_is_converted_takes_its_entries_along() -> None:
    model = network()
    optimizer = SaraAdamW(model, fraction=0.2, lr=1e-3)
    model.double()
    loss_of(model, batch().double()).backward()
    dense = network().double()
    loss_of(dense, batch().double()).backward()
    grads = {name: parameter.grad for name, parameter in dense.named_parameters()}
    for entries in optimizer.sparse.entries:
        if entries.selection.count:
            # float64 all the way: a leaf that had stayed float32 would be a thousand times off
            found = entries.selection.gather(grads[entries.name])
            torch.testing.assert_close(entries.gradient(), found, rtol=1e-10, atol=1e-12)
    leaf = model[0].chosen
    assert leaf.dtype == torch.float64 and leaf.untyped_storage().nbytes() == 8
    optimizer.step()


@pytest.mark.slow
def test_compiled_it_trains_the_same() -> None:
    losses = []
    for compiled in (False, True):
        model = network()
        optimizer = SaraAdamW(model, fraction=0.2, lr=1e-2)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(3):
            optimizer.zero_grad()
            loss = (forward(batch(step)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)


def test_a_config_beside_a_config_is_refused() -> None:
    model = get_peft_model(network(), SaraConfig(fraction=0.1))
    with pytest.raises(ValueError, match="a choice beside it"):
        SaraAdamW(model, threshold=1e-3)
    assert SaraAdamW(model).sparse is model.sparse
