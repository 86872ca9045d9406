"""Double Sparsity by hand: rankings, labels, choices, bytes; the arms, texts, settings, and real models."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common import params as parameters
from common.attention.causal import CausalSite
from common.models.stable_diffusion import MissingWeights
from common.training import long_context
from common.training.long_context import RECIPES, TEXT, build
from papers.double_sparsity import data, evaluation, experiment, method
from papers.double_sparsity.settings import Params


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**changes) -> Params:
    small = {"arms": ["ds", "exact", "h2o"], "ratios": [4, 16], "tasks": ["retrieve"], "passages": 2, "prompts": 2}
    small |= {"rows": 2, "calibration": 4, "contexts": [64], "batches": [1], "repeats": 1, "heads": 2, "head": 16}
    return dataclasses.replace(parameters.load(Params, "double_sparsity", "smoke"), **(small | changes))


def untrained(params: Params) -> experiment.Model:
    torch.manual_seed(0)
    state = build(RECIPES["tiny"], len(long_context.corpus(params.dataset).vocabulary)).state_dict()
    return experiment.Model("tiny", state, "")


# ------------------------------------------------------------------------------------------------------------ rankings


@pytest.mark.parametrize("groups", [4, 2])
def test_importance_is_the_mean_over_all_tokens(groups: int) -> None:
    batches = [[(draw(2, 4, 5, 8, seed=i), draw(2, groups, 5, 8, seed=10 + i))] for i in range(3)]
    (found,) = method.calibrate(batches)
    keys = torch.cat([batch[0][1].repeat_interleave(4 // groups, dim=1) for batch in batches])
    queries = torch.cat([batch[0][0] for batch in batches])
    torch.testing.assert_close(found, (queries * keys).abs().double().mean((0, 2)))
    torch.testing.assert_close(method.calibrate(batches, "q")[0], queries.abs().double().mean((0, 2)))
    torch.testing.assert_close(method.calibrate(batches, "k")[0], keys.abs().double().mean((0, 2)))


def test_as_released_only_the_last_batch_counts() -> None:
    batches = [[(draw(1, 2, n, 8, seed=n), draw(1, 2, n, 8, seed=20 + n))] for n in (5, 9, 3)]
    assert torch.equal(method.calibrate(batches, released=True)[0], method.calibrate(batches[-1:])[0])
    assert not torch.equal(method.calibrate(batches)[0], method.calibrate(batches[-1:])[0])
    with pytest.raises(ValueError, match="no batch"):
        method.calibrate([])


def test_the_best_channels_and_their_overlap() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 4.0], [2.0, 1.0, 0.0, 3.0]])
    assert method.top_channels(scores, 2).tolist() == [[1, 3], [3, 0]]
    assert method.overlap(torch.tensor([[1, 3], [3, 0]]), torch.tensor([[3, 2], [0, 3]])) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="5 of 4 channels"):
        method.top_channels(scores, 5)


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_are_the_channels_of_their_head() -> None:
    key, channels = draw(2, 3, 5, 8), torch.tensor([[1, 7], [0, 2], [5, 3]])
    labels = method.labels_of(key, channels)
    for head, places in enumerate(channels.tolist()):
        assert torch.equal(labels[:, head], key[:, head][..., places])


def test_four_bits_are_fifteen_even_levels() -> None:
    labels = draw(1, 2, 50, 8)
    found = method.quantized(labels, 4)
    scale = labels.abs().amax(-1, keepdim=True) / 7
    torch.testing.assert_close(found / scale, (found / scale).round())
    assert (found - labels).abs().max() <= scale.max() / 2 + 1e-6
    assert ((found - labels).abs() <= scale / 2 + 1e-6).all()
    assert not method.quantized(torch.zeros(1, 1, 3, 4), 4).any()


# ------------------------------------------------------------------------------------------------------------ choosing


def test_the_tokens_with_the_largest_products_of_labels_are_read() -> None:
    query, key = draw(1, 2, 20, 8), draw(1, 2, 20, 8, seed=1)
    channels = torch.tensor([[1, 7], [0, 2]])
    chosen = method.DoubleSparsity(channels=[channels], keep=0.25)
    mask = chosen.plan(query, key, CausalSite(0, 10, 1.0))(10, 20)
    for head in range(2):
        for i in range(10, 20):
            places = channels[head].tolist()
            scores = key[0, head, : i + 1][:, places] @ query[0, head, i, places]
            best = set(scores.topk(math.ceil(0.25 * (i + 1))).indices.tolist())
            assert set(mask[0, head, i - 10].nonzero().flatten().tolist()) == best
    with pytest.raises(ValueError, match="layer 1 and channels of 1 layers"):
        chosen.plan(query, key, CausalSite(1, 10, 1.0))
    with pytest.raises(ValueError, match="keep=0, bits=16"):
        method.DoubleSparsity(channels=[channels], keep=0)


def test_a_step_by_copied_rows_is_attention_over_the_chosen() -> None:
    query, key, value = draw(2, 3, 1, 16), draw(2, 3, 40, 16, seed=1), draw(2, 3, 40, 16, seed=2)
    channels = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:4] for i in range(3)])
    found = method.decode(query, key, value, method.labels_of(key, channels), channels, 5)
    for b in range(2):
        for h in range(3):
            places = channels[h].tolist()
            best = (key[b, h][:, places] @ query[b, h, 0, places]).topk(5).indices
            weights = (key[b, h, best] @ query[b, h, 0] / 4).softmax(0)
            torch.testing.assert_close(found[b, h, 0], weights @ value[b, h, best])


def test_bytes_by_hand() -> None:
    cache = method.Cache(length=1600, size=128)
    assert cache.dense() == 2 * 1600 * 128 * 2
    assert cache.sparse(8, 100) == 1600 * 8 * 2 + 2 * 100 * 128 * 2
    assert cache.sparse(8, 100, bits=4) == 1600 * 8 / 2 + 1600 * 2 + 2 * 100 * 128 * 2
    assert cache.sparse(8, 100, bits=4, scales=False) == 1600 * 8 / 2 + 2 * 100 * 128 * 2


def test_planted_channels_are_the_large_ones_of_both() -> None:
    query, key, outliers = data.planted(0, heads=3, length=400, size=32, outliers=2)
    spread = [x[0].std(1) for x in (query, key)]
    for head in range(3):
        large = [set((part[head] > 3).nonzero().flatten().tolist()) for part in spread]
        assert large[0] & large[1] == set(outliers[head].tolist())
        assert [len(part) for part in large] == [4, 4]


# ---------------------------------------------------------------------------------------------------------------- arms


def test_an_arm_reads_its_share() -> None:
    params = tiny(arms=["ds", "ds_4bit", "ds_random", "exact", "quest", "h2o", "streaming"])
    found = experiment.evaluate(params, untrained(params), 0)
    assert set(found["perplexity"]) == {("dense", 1), *((arm, r) for arm in params.arms for r in params.ratios)}
    length, prompt = params.context, params.context // 2
    for arm in params.arms:
        read = sum(math.ceil(i / 4) for i in range(prompt + 1, length + 1)) / sum(range(prompt + 1, length + 1))
        assert found["density"][arm, 4] == pytest.approx(read, abs=0.03 if arm == "quest" else 1e-9)
    assert found["density"]["dense", 1] == 1


def test_the_same_seed_gives_the_same_and_rankings_know_their_texts() -> None:
    params = tiny()
    model = untrained(params)
    first, again = (experiment.evaluate(params, model, 0) for _ in range(2))
    assert first == again
    ranked = experiment.rankings(params, model, 0)
    assert list(ranked) == ["text", "tasks", "again"]
    assert evaluation.static({**ranked, "tasks": ranked["text"]}, 16)["text/tasks"] == 1
    assert evaluation.static(ranked, 4)["chance"] == 0.25


def test_reading_everything_is_the_dense_model() -> None:
    params = tiny(ratios=[1, 16], arms=["ds", "quest", "h2o", "streaming"])
    found = experiment.evaluate(params, untrained(params), 0)
    dense = found["perplexity"]["dense", 1]
    assert [found["perplexity"][arm, 1] for arm in params.arms] == pytest.approx([dense] * 4, rel=1e-4)


def test_calibration_is_of_its_kind() -> None:
    params, lm = tiny(), experiment.network(tiny(), untrained(tiny()))
    text, tasks_ = (data.calibration(params, lm, kind, 0) for kind in ("text", "tasks"))
    assert all((part >= TEXT).all() for part in text) and all((part < TEXT).all() for part in tasks_)
    both = data.calibration(params, lm, "both", 0)
    assert [bool((part >= TEXT).all()) for part in both] == [True, False]
    assert sum(len(part) for part in text) == 4


def test_timings_are_of_both_ways() -> None:
    found = experiment.timings(tiny(repeats=2), 64, 1)
    assert len(found) == 2 and all(set(row) == {"dense", "sparse"} and min(row.values()) > 0 for row in found)


def test_bad_settings_are_refused() -> None:
    for changes, message in (
        ({"ratios": [4, 8]}, "16 among them"),
        ({"arms": ["h2o"]}, "ds among them"),
        ({"contexts": [64, 32]}, "contexts: got"),
        ({"dataset": "folder"}, "expected none with dataset folder"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)


# ---------------------------------------------------------------------------------------------------------- real models


def test_a_model_of_transformers_is_measured_on_own_texts(tmp_path: Path) -> None:
    from tiny_pretrained import write_language_models

    root = write_language_models(tmp_path)
    for name in ("calibration.txt", "test.txt"):
        (root / name).write_text((root / "text.txt").read_text())
    params = tiny(dataset="folder", data_dir=str(root), model=str(root / "llama"), tasks=[], context=48)
    model = experiment.prepare(params)
    assert model.state is None and len(model.sha256) == 64
    found = experiment.evaluate(params, model, 0)
    assert found["density"]["ds", 16] < 0.2 and math.isfinite(found["perplexity"]["ds", 16])
    assert list(experiment.rankings(params, model, 0)) == ["text", "again"]


def test_missing_texts_and_weights_are_named(tmp_path: Path) -> None:
    params = tiny(dataset="folder", model=str(tmp_path / "nowhere"), tasks=[])
    with pytest.raises(MissingWeights, match="nowhere cannot be loaded"):
        experiment.prepare(params)
    lm = experiment.network(tiny(), untrained(tiny()))
    with pytest.raises(FileNotFoundError, match="data_dir is empty"):
        data.passages(params, lm, "test", 1, 0)
    with pytest.raises(FileNotFoundError, match=r"test\.txt does not exist"):
        data.passages(dataclasses.replace(params, data_dir=str(tmp_path)), lm, "test", 1, 0)
