"""RL's subnetworks by hand: masks, overlaps, precisions, losses, the task, the arms, settings, and published pairs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common import params as parameters
from common import seeds
from common.models.stable_diffusion import MissingWeights
from papers.rl_subnetworks import data, evaluation, experiment, method, pretrained
from papers.rl_subnetworks.experiment import Arm, Run
from papers.rl_subnetworks.settings import Params


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**changes) -> Params:
    small = {"width": 16, "steps": 4, "check": 2, "prompts": 4, "answers": 4, "questions": 32, "base_steps": 10}
    return dataclasses.replace(parameters.load(Params, "rl_subnetworks", "smoke"), **(small | changes))


def untrained(params: Params) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(experiment.build(params).state_dict())


# ------------------------------------------------------------------------------------------------------------- updates


def test_sparsity_counts_what_stays() -> None:
    before = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    after = {"a": torch.tensor([[1.0, 0.0, 1e-6], [0.0, 0.0, -2.0]]), "b": torch.tensor([0.0, 0.0, 1e-4, 0.0])}
    found = [method.sparsity(method.changed(before, after, tolerance)) for tolerance in (0.0, 1e-5, 1e-3)]
    assert found == pytest.approx([0.6, 0.7, 0.8])
    with pytest.raises(ValueError, match="different names"):
        method.changed(before, {"a": after["a"]})


def test_density_is_the_share_that_carries() -> None:
    before = {"a": torch.zeros(1000, 10)}
    some = torch.zeros(10000)
    some[:700] = 0.3
    assert method.density(before, {"a": some.view(1000, 10)}) == pytest.approx(0.07)
    normal = {"a": draw(1000, 10)}
    assert method.density(before, normal) == pytest.approx(2 / math.pi, abs=0.01)
    assert method.density(before, {"a": 1e-4 * normal["a"]}) == pytest.approx(method.density(before, normal))
    assert method.density(before, before) == 0


def test_rank_is_over_the_matrices_that_changed() -> None:
    before = {"a": torch.zeros(6, 4), "b": torch.zeros(5, 5), "c": torch.zeros(7)}
    after = {"a": draw(6, 2) @ draw(2, 4, seed=1), "b": torch.zeros(5, 5), "c": torch.ones(7)}
    assert method.rank_share(before, after) == pytest.approx(0.5)
    assert method.rank_share(before, before) == 0


def test_overlap_is_of_the_first_and_chance_is_the_second_s_share() -> None:
    first, second = ({"a": draw(200, 200, seed=seed) > level} for seed, level in ((0, 1.0), (1, 0.3)))
    both = (first["a"] & second["a"]).sum() / first["a"].sum()
    assert method.overlap(first, second) == pytest.approx(both.item())
    assert method.overlap(first, second) == pytest.approx(1 - method.sparsity(second), abs=0.02)
    assert method.overlap(first, first) == 1


def test_the_smallest_and_the_shuffled_are_as_many() -> None:
    values, marked = {"a": draw(9, 5), "b": draw(4)}, {"a": draw(9, 5, seed=1) > 0.5, "b": draw(4, seed=2) > 9}
    small = method.smallest(values, marked)
    mixed = method.shuffled(marked, torch.Generator().manual_seed(0))
    for name, part in marked.items():
        assert small[name].sum() == mixed[name].sum() == part.sum() and small[name].shape == part.shape
    assert values["a"][small["a"]].abs().max() < values["a"][~small["a"]].abs().min()


# ---------------------------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("precision", experiment.PRECISIONS)
def test_weights_follow_their_precision(precision: method.Precision) -> None:
    layer = nn.Linear(30, 20)
    before = method.rounded(layer.weight.detach())
    layer.weight.data.copy_(before)
    weights = method.Weights(layer, precision)
    for _ in range(50):
        for own in weights.trained:
            own.data.add_(1e-4)
        weights.store()
    moved = layer.weight.detach() - before
    if precision == "float32":
        torch.testing.assert_close(moved, torch.full_like(moved, 5e-3), rtol=1e-3, atol=0)
    else:
        assert torch.equal(layer.weight, method.rounded(layer.weight))
        stuck = before.abs() / 512 > 1e-4  # less than half of the distance to the neighbour, whatever the binade
        if precision == "bfloat16":
            assert stuck.any() and not moved[stuck].any()
        else:
            torch.testing.assert_close(moved, torch.full_like(moved, 5e-3), rtol=0, atol=2**-10)


def test_only_masked_weights_get_a_gradient() -> None:
    layer = nn.Linear(3, 2)
    mask = {
        "weight": torch.tensor([[True, False, False], [False, True, False]]),
        "bias": torch.zeros(2, dtype=torch.bool),
    }
    weights = method.Weights(layer, "float32", mask)
    layer(torch.ones(4, 3)).sum().backward()
    weights.collect()
    grads = dict(zip(mask, (own.grad for own in weights.trained), strict=True))
    assert grads["weight"].ne(0).equal(mask["weight"]) and not grads["bias"].any()
    assert layer.weight.grad is None


# -------------------------------------------------------------------------------------------------------------- losses


def test_advantages_are_within_their_group() -> None:
    found = method.advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(found[0], torch.tensor([1.0, -1.0, -1.0, 1.0]), atol=1e-5, rtol=0)
    assert not found[1].any()


def test_clipping_stops_what_has_gone_far_enough() -> None:
    old, advantage = torch.zeros(2, 1), torch.tensor([1.0, -1.0])
    for shift, moves in ((0.0, [True, True]), (0.5, [False, True]), (-0.5, [True, False])):
        new = torch.full((2, 1), shift, requires_grad=True)
        (grad,) = torch.autograd.grad(method.policy_loss(new, old, advantage, clip=0.2), new)
        assert grad.ne(0).flatten().tolist() == moves
        (free,) = torch.autograd.grad(method.policy_loss(new, old, advantage, clip=None), new)
        assert free.ne(0).all()


def test_kl_is_zero_at_the_reference_and_pulls_back() -> None:
    new = torch.tensor([[0.3, -0.2]], requires_grad=True)
    none = torch.zeros(1)
    assert method.policy_loss(
        new, new.detach(), none, clip=0.2, reference=new.detach(), kl=1.0
    ).item() == pytest.approx(0)
    loss = method.policy_loss(new, new.detach(), none, clip=0.2, reference=torch.zeros(1, 2), kl=2.0)
    assert loss.item() == pytest.approx(sum(math.exp(-x) + x - 1 for x in (0.3, -0.2)))
    (grad,) = torch.autograd.grad(loss, new)
    assert grad.sign().tolist() == [[1.0, -1.0]]


# ------------------------------------------------------------------------------------------------------------ the task


def test_the_verifier_takes_sorted_digits_in_either_alphabet() -> None:
    asked = torch.tensor([[3, 1, 2, data.BAR]]).repeat(5, 1)
    answers = torch.tensor([[1, 2, 3], [11, 12, 13], [1, 12, 3], [1, 3, 2], [1, 2, data.BAR]])
    assert data.rewards(asked, answers).tolist() == [1, 1, 1, 0, 0]
    assert data.demonstrations(asked[:1], 0.0).tolist() == [[1, 2, 3]]
    assert data.demonstrations(asked[:1], 1.0).tolist() == [[11, 12, 13]]
    assert not data.rewards(torch.tensor([[0, 0, 0, data.BAR]]), torch.tensor([[0, 0, data.BAR]])).any()


def test_what_the_base_reads_is_careless_half_of_the_time() -> None:
    generator = torch.Generator().manual_seed(0)
    asked = data.prompts(4000, 5, generator)
    answers = data.written(asked, generator)
    assert data.rewards(asked, answers).mean().item() == pytest.approx(1 - data.CARELESS, abs=0.03)
    assert (answers >= data.DIGITS).float().mean().item() == pytest.approx(data.RARE, abs=0.02)


def test_samples_have_the_model_s_probabilities() -> None:
    params = tiny(digits=2)
    network = experiment.build(params, untrained(params))
    asked = data.prompts(1, 2, torch.Generator().manual_seed(1)).repeat(4000, 1)
    answers = data.sample(network, asked, torch.Generator().manual_seed(0))
    first = network(asked[:1])[0, -1].softmax(-1)
    shares = torch.bincount(answers[:, 0], minlength=data.VOCABULARY) / 4000
    torch.testing.assert_close(shares, first, atol=0.04, rtol=0)
    told = data.answer_log_probabilities(network, asked[:3], answers[:3])
    torch.testing.assert_close(told[:, 0], first.log()[answers[:3, 0]])


# ------------------------------------------------------------------------------------------------------------ the arms


def test_every_arm_trains_and_repeats() -> None:
    params = tiny(arms=["rl", "rl_kl", "rl_unclipped", "sft", "sft_far"], other_rates=[0.001])
    state = untrained(params)
    arms = experiment.arms(params)
    assert [arm.label(params) for arm in arms[-2:]] == ["sft_far/master", "rl/master/0.001"] and len(arms) == 10
    start = experiment.start(state)
    for arm in arms:
        first, second = (experiment.train(params, state, arm, 1) for _ in range(2))
        assert first.accuracy == second.accuracy and first.steps == 4 and set(first.accuracy) == {0, 2, 4}
        assert all(torch.equal(first.state[name], second.state[name]) for name in start)
        if arm.name.startswith("sft"):  # an untrained model may earn no reward, and then RL stays where it is
            assert method.sparsity(method.changed(start, first.state)) < 1
    far, usual = (experiment.train(params, state, Arm(name, "float32", 1e-4), 1) for name in ("sft_far", "sft"))
    assert far.surprise != usual.surprise


def test_a_training_ends_at_its_accuracy() -> None:
    params = tiny(target=0.0)
    assert experiment.train(params, untrained(params), Arm("sft", "float32", 1e-3), 0).steps == 0


def test_a_subnetwork_alone_moves_nothing_else() -> None:
    params = tiny()
    state = untrained(params)
    start, arm = experiment.start(state), Arm("sft", "bfloat16", 1e-4)
    full = experiment.train(params, state, arm, 0)
    pair = {name: experiment.again(params, state, arm, 0, full, random=name == "random") for name in ("sub", "random")}
    found = {(name, variant): value for name, variant, value in evaluation.of_subnetworks(start, full, pair)}
    assert found["moved_outside", "sub"] == 0
    assert found["same_weights", "sub"] >= found["same_weights", "random"]
    assert found["same_weights", "sub/all"] <= 1 and pair["sub"].steps == full.steps


def test_overlaps_are_told_for_both_precisions() -> None:
    before = {"a": draw(20, 20)}

    def run(seed: int) -> Run:
        moved = before["a"] + 0.01 * (draw(20, 20, seed=seed) > 1)
        return Run({"a": moved}, 1, {0: 0.0}, False, 0.0)

    runs = [
        {f"{n}/{p}": run(k + 2 * s) for k, n in enumerate(("rl", "sft")) for p in ("bfloat16", "master")}
        for s in (1, 2)
    ]
    found = {variant: value for _, variant, value in evaluation.of_overlaps(before, *runs)}
    own, other = (method.changed(before, part["rl/bfloat16"].state) for part in runs)
    assert found["bfloat16/seeds"] == method.overlap(own, other) == found["master/seeds"]
    assert found["bfloat16/chance"] == pytest.approx(other["a"].float().mean().item())
    assert len(found) == 10


def test_the_base_is_trained_on_the_text() -> None:
    params = tiny(digits=2, base_steps=60, width=32)
    network = experiment.build(params, experiment.make(params))
    asked = data.prompts(200, 2, seeds.generator(0, "test"))
    right, wrong = (data.demonstrations(asked, rare) for rare in (0.0, 1.0))
    told = [data.answer_log_probabilities(network, asked, answers).mean().item() for answers in (right, wrong)]
    assert told[0] > told[1] + 1


def test_bad_settings_are_refused() -> None:
    for changes, message in (
        ({"arms": ["rl"]}, "rl and sft among them"),
        ({"tolerances": [0.0, 1e-3]}, "0 and 1e-5 among them"),
        ({"seeds": [0]}, "two or more"),
        ({"pairs": ["a"]}, "name/before > name/after"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)


def test_own_answers_need_one_that_is_right() -> None:
    params = tiny(arms=["rl", "sft", "sft_near"], digits=8, prompts=2)
    with pytest.raises(ValueError, match="no right answer of 8"):
        experiment.train(params, untrained(params), Arm("sft_near", "float32", 1e-4), 0)


# ----------------------------------------------------------------------------------------------------- published pairs


def test_published_pairs_are_compared(tmp_path: Path) -> None:
    from tiny_pretrained import write_language_models
    from transformers import AutoModelForCausalLM

    root = write_language_models(tmp_path)
    network = AutoModelForCausalLM.from_pretrained(root / "llama", dtype=torch.bfloat16)
    weight = network.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[:10] += 1.0
    network.save_pretrained(root / "tuned")
    found = pretrained.compare(str(root / "llama"), str(root / "tuned"), [0.0, 1e-5, 10.0])
    total = sum(parameter.numel() for parameter in network.parameters())
    assert found.sparsity == {0.0: 1 - 10 * 64 / total, 1e-5: 1 - 10 * 64 / total, 10.0: 1.0}
    with pytest.raises(MissingWeights, match="nowhere cannot be loaded"):
        pretrained.compare(str(root / "nowhere"), str(root / "tuned"), [0.0])
    with pytest.raises(ValueError, match="other weights"):
        pretrained.compare(str(root / "gpt2"), str(root / "tuned"), [0.0])
