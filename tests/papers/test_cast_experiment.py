"""CAST's arms: shared starts and windows, exact patterns at the end, settings, the power law, real models' layout."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from common import params as parameters
from common.data.text import Corpus
from common.models import causal_lm
from common.models.causal_lm import CausalLM
from common.models.stable_diffusion import MissingWeights
from papers.cast import data, evaluation, experiment, method
from papers.cast.settings import ArmName, Params


def tiny(**changes) -> Params:
    small = {"length": 1500, "width": 16, "depth": 1, "context": 8, "pretrain_steps": 20, "steps": 20, "batch": 4}
    small |= {"warmup": 2, "calibration": 8}
    return dataclasses.replace(parameters.load(Params, "cast", "smoke"), **(small | changes))


@cache
def start() -> dict:
    return experiment.pretrain(tiny(), 0)


def made(arm: str, pattern: str = "2:4", budget: float = 1.0, seed: int = 0) -> tuple[dict, nn.Module]:
    """An arm's result and its network, caught as it is scored for the last time."""
    caught: list[nn.Module] = []
    scores = experiment._scores

    def keep(params: Params, network: nn.Module, texts: Corpus) -> dict:
        caught.append(network)
        return scores(params, network, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_scores", keep)
        found = experiment.make(tiny(), arm, pattern, budget, start(), seed)
    return found, caught[-1]


@pytest.mark.parametrize("arm", [arm for arm in experiment.ARMS if arm != "dense"])
def test_every_arm_ends_exactly_n_of_m_in_plain_layers(arm):
    _, network = made(arm)
    layers = method.in_blocks(network)
    assert len(layers) == 6
    for layer in layers.values():
        assert type(layer) is nn.Linear
        kept = (layer.weight != 0).unflatten(1, (-1, 4)).sum(-1)
        assert set(kept.flatten().tolist()) == {2}
    assert (network.head.weight != 0).all()


def test_the_dense_arm_stays_dense_and_other_patterns_are_met():
    _, network = made("dense")
    assert all((layer.weight != 0).all() for layer in method.in_blocks(network).values())
    _, sparse = made("cast", "2:8")
    for layer in method.in_blocks(sparse).values():
        assert set((layer.weight != 0).unflatten(1, (-1, 8)).sum(-1).flatten().tolist()) == {2}


def test_a_seed_fixes_an_arm():
    first, again = made("cast")[0], made("cast")[0]
    assert first["losses"] == again["losses"] and first["perplexity"] == again["perplexity"]


def test_arms_share_their_start_and_their_windows():
    """With no pull and no distillation CAST begins as its own ablation does, and GMP as dense training does."""
    assert made("no_decay")[0]["losses"][:2] == made("cast")[0]["losses"][:2]  # the pull of step 0 is none
    assert made("dense")[0]["losses"][0] == made("gmp")[0]["losses"][0]


def test_budgets_shorten_the_training_and_its_warm_up():
    found = made("cast", budget=0.5)[0]
    assert len(found["losses"]) == 10 and found["remaining"][-1][0] == 10
    assert experiment.steps_of(tiny(), 0.25) == 5


def test_what_is_recorded_of_a_training():
    found = made("cast")[0]
    assert [step for step, _ in found["remaining"]] == list(range(21))
    weights = sum(layer.weight.numel() for layer in method.in_blocks(made("dense")[1]).values())
    assert {sum(counts) for counts in found["sizes"].values()} == {weights}
    assert "before" in found and "before" not in made("gmp")[0] and "losses" not in made("wanda")[0]


def test_the_learning_rate_carries_a_weight_as_far_as_said():
    params = tiny()
    rate = experiment.learning_rate(params, {"magnitude": 0.05})
    shares = experiment._schedule(params, params.steps).share
    assert rate * sum(shares(t) * t / params.steps for t in range(params.steps)) == pytest.approx(4 * 0.05)
    assert experiment.learning_rate(dataclasses.replace(params, learning_rate=0.3), {"magnitude": 1.0}) == 0.3


def test_every_arm_can_be_named():
    assert set(get_args(ArmName)) == set(experiment.ARMS)


def test_a_power_law_has_ratio_one_and_nothing_else_has():
    assert evaluation.power_law([8.0, 4.0, 2.0]) == pytest.approx(1.0)
    assert evaluation.power_law([9.9, 3 * 2**-0.3, 3 * 4**-0.3, 3 * 8**-0.3]) == pytest.approx(1.0)
    assert evaluation.power_law([4.0, 3.0, 2.0]) == pytest.approx(9 / 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patterns": ["2-4"]}, "'2-4', expected n:m"),
        ({"patterns": ["4:4"]}, "'4:4', expected n:m with 1 <= n < m"),
        ({"arms": ["dense", "gmp"], "pattern_arms": []}, "expected cast among them too"),
        ({"arms": ["dense", "cast"], "pattern_arms": ["gmp"]}, "expected gmp among them too"),
        ({"budgets": [0.5]}, "expected rising shares that end in 1"),
        ({"budgets": [1.0, 0.5]}, "expected rising shares"),
        ({"model": "gpt2"}, "expected a model of transformers together with dataset folder"),
        ({"dataset": "folder"}, "expected a model of transformers together with dataset folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


# ------------------------------------------------------------------------------------------------------ transformers


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A tiny GPT-2 with its tokenizer, saved in the layout of transformers, and two texts beside it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz ."
    coder = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="."))
    coder.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    folder = tmp_path / "gpt2"
    PreTrainedTokenizerFast(tokenizer_object=coder, unk_token=".").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(letters), n_positions=16, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name, repeats in (("train", 60), ("test", 10)):
        (tmp_path / f"{name}.txt").write_text("the quick brown fox jumps over the lazy dog. " * repeats)
    return tmp_path


def test_a_model_of_transformers_is_the_same_with_plain_linear_layers(gpt2):
    from transformers import GPT2LMHeadModel

    ours = CausalLM.from_pretrained(str(gpt2 / "gpt2")).eval()
    theirs = GPT2LMHeadModel.from_pretrained(gpt2 / "gpt2").eval()
    tokens = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits)
    assert len(method.in_blocks(ours)) == 8 and ours.network.lm_head.weight is ours.network.transformer.wte.weight
    assert ours.encode("abc").tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no tokenizer"):
        CausalLM(nn.Module()).encode("a")


def test_the_paper_profile_runs_on_a_tiny_model_in_the_layout_of_transformers(gpt2):
    changes = {"model": str(gpt2 / "gpt2"), "data_dir": str(gpt2), "device": "cpu", "autocast": True}
    small = {"context": 12, "steps": 6, "batch": 2, "warmup": 2, "calibration": 4, "workers": 1}
    params = dataclasses.replace(parameters.load(Params, "cast", "paper"), **changes, **small)
    texts = data.corpus(params)
    assert texts.name == "own_text" and len(texts.test) == 450 and data.hashes(params, texts).keys() == {"own_text"}
    name, sha256 = data.identity(params, experiment.build(params, 0))
    assert name == "gpt2" and len(sha256) == 64
    start = experiment.pretrain(params, 0)
    assert start["state"] is None and start["losses"] == [] and start["perplexity"] > 1
    for arm in ("sparsegpt", "gmp", "ast_slorb", "cast"):
        found = experiment.make(params, arm, "2:4", 1.0, start, 0)
        assert 1 < found["perplexity"] < 1000


def test_what_is_missing_is_said(gpt2, tmp_path):
    params = dataclasses.replace(parameters.load(Params, "cast", "paper"), model=str(gpt2 / "gpt2"))
    with pytest.raises(FileNotFoundError, match="data_dir is empty"):
        data.corpus(params)
    with pytest.raises(FileNotFoundError, match=r"train.txt does not exist"):
        data.corpus(dataclasses.replace(params, data_dir=str(gpt2 / "gpt2")))
    with pytest.raises(MissingWeights, match="name a folder that holds it"):
        causal_lm.CausalLM.from_pretrained(str(tmp_path / "nowhere"))
