"""The Sparse Frontier: costs and statistics by hand, settings, prompts in English, a cell of the grid, real models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from common import params as parameters
from common.attention.prefill import BlockSparse, FlexPrefill
from common.data import tasks
from common.models.stable_diffusion import MissingWeights
from common.training import long_context
from common.training.long_context import RECIPES, build, questions
from papers.sparse_frontier import data, evaluation, experiment, method
from papers.sparse_frontier.method import QWEN2_7B, Settings, Shape
from papers.sparse_frontier.settings import Params

TOY = Shape(width=8, layers=2, heads=2, key_heads=1, head=4, hidden=16, vocabulary=10)


def tiny(**changes) -> Params:
    small = {"prompts": 2, "rows": 2, "sparsities": [0.5], "coverages": [0.5]}
    small |= {"methods": ["vertical_slash", "block", "quest"], "seeds": [0, 1]}
    return dataclasses.replace(parameters.load(Params, "sparse_frontier", "smoke"), **(small | changes))


def untrained(params: Params, name: str = "tiny") -> experiment.Model:
    torch.manual_seed(0)
    state = build(RECIPES[name], len(long_context.corpus(params.dataset).vocabulary)).state_dict()
    return experiment.Model(name, state, "")


# --------------------------------------------------------------------------------------------------------------- costs


def test_the_cost_of_a_prefill_is_the_formula_written_out() -> None:
    length, density, d, heads, head, groups = 100, 0.3, 8, 2, 4, 1
    attention = density * (4 * heads * length**2 * head + 3 * heads * length**2)
    projections = 2 * length * d * (2 * d + 2 * head * groups)
    feed_forward = 2 * length * 3 * d * 16
    expected = 2 * (projections + attention + feed_forward) + 2 * length * d * 10
    assert method.prefill_flops(TOY, length, density) == pytest.approx(expected)
    assert method.prefill_flops(TOY, length, density, indexing=7.0) == pytest.approx(expected + 7)
    assert method.prefill_flops(TOY, length, density, logits=False) == pytest.approx(expected - 2 * length * d * 10)


def test_a_decoding_step_reads_the_weights_once_and_every_cache() -> None:
    weights = 2 * (8 * (2 * 8 + 2 * 4) + 3 * 8 * 16) + 8 * 10
    cache = 2 * 2 * 100 * 4 * 1
    assert method.decode_bytes(TOY, 100, 0.5, batch=3) == 2 * (weights + 3 * cache * 0.5)
    assert method.decode_indexing("quest", TOY, 100, Settings(page=10)) == 2 * 10 * 4 * 1 * 2
    assert method.decode_indexing("snapkv", TOY, 100, Settings()) == 0


def test_qwen_has_seven_billion_weights_and_the_shares_that_its_sizes_give() -> None:
    assert QWEN2_7B.weights == pytest.approx(7.07e9, rel=0.01)  # 7.62 billion with the embeddings
    shares = [method.attention_share(QWEN2_7B, length) for length in (2**14, 2**16, 2**17)]
    assert shares == pytest.approx([0.319, 0.652, 0.789], abs=1e-3)
    assert method.speedup(0.8, 5) == pytest.approx(1 / 0.36)


def test_searching_costs_less_than_the_attention_it_spares() -> None:
    for name in method.PREFILL:
        search = method.prefill_indexing(name, QWEN2_7B, 2**16, Settings())
        assert 0 < search < 0.02 * method.attention_flops(QWEN2_7B, 2**16)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_errors_and_interpolation_by_hand() -> None:
    assert method.relative_error(0.8, 0.6) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="can do the task"):
        method.relative_error(0.0, 0.1)
    points = {0.0: 1.0, 0.5: 0.8, 0.9: 0.0}
    assert [method.interpolated(points, at) for at in (-1, 0.25, 0.7, 2)] == pytest.approx([1.0, 0.9, 0.4, 0.0])
    errors = {0.0: 0.0, 0.5: 0.02, 0.9: 0.10, 0.95: 0.01}
    assert method.tolerated(errors, 0.05) == pytest.approx(0.5 + 0.4 * 3 / 8)  # up to the first excess
    assert method.tolerated(errors, 0.2) == 0.95
    assert method.tolerated(errors, 0.2, 0.9) == method.tolerated({0.0: 0.0, 0.97: 0.1}, 0.2, 0.9) == 0.9
    assert method.tolerated({0.0: 0.3, 0.5: 0.0}, 0.2) == 0


def test_the_front_holds_what_no_cheaper_point_reaches() -> None:
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.5), (2.5, 0.8), (4.0, 0.85), (1.0, 0.4)]
    assert method.pareto(points) == [1, 3, 0]


def test_larger_models_are_compared_at_the_cost_of_the_smaller_one() -> None:
    params = tiny(tasks=["retrieve"], models=["tinier", "tiny"], sparsities=[0.5, 0.9])
    shapes = {name: experiment.shape(params, untrained(params, name)) for name in params.models}
    points = {name: [(0.5, 0.5, 0.8), (0.1, 0.9, 0.4)] for name in params.methods}
    grid = {(m, "retrieve", "long", 0): {"dense": d, "points": points} for m, d in (("tiny", 0.9), ("tinier", 0.3))}
    length = params.lengths[-1]
    cheapest = evaluation.costs(params, shapes["tiny"], "prefill", "block", length, 0.9)
    small = evaluation.costs(params, shapes["tinier"], "prefill", "dense", length, 0.0)
    gain = evaluation.iso_cost_gain(params, grid, shapes, "prefill", "block", 0)
    assert cheapest > small and gain == -1  # one layer of two cannot be saved
    same = shapes | {"tinier": shapes["tiny"]}
    found = evaluation.iso_cost_gain(params, grid, same, "prefill", "block", 0)
    assert 0.5 < found < 0.6  # searching costs a little, so not all of 0.9 - 0.3


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_paper_profile_has_the_authors_settings() -> None:
    params = parameters.load(Params, "sparse_frontier", "paper")
    assert params.of_methods("track") == Settings()
    assert params.of_methods("retrieve_one") == Settings(window=512)


def test_a_method_gets_its_settings() -> None:
    flex = method.selector("flex_prefill", 0.7, Settings(least=3))
    assert isinstance(flex, FlexPrefill) and (flex.coverage, flex.least, flex.window) == (0.7, 3, 256)
    block = method.selector("block", 0.2, Settings())
    assert isinstance(block, BlockSparse) and (block.keep, block.block) == (0.2, 16)


def test_bad_settings_are_refused() -> None:
    for changes, message in (
        ({"lengths": [64, 32, 128]}, "three rising"),
        ({"sparsities": [0.5, 1.0]}, "between 0 and 1"),
        ({"methods": ["quest"]}, "vertical_slash, block and quest"),
        ({"models": ["tiny"]}, "expected two"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)


# ------------------------------------------------------------------------------------------------------- prompts, grid


def test_skill_takes_guessing_off() -> None:
    assert data.skill("filter", 0.5) == 0 and data.skill("retrieve", 1.0) == 1
    assert data.skill("common", 1 / 8) == pytest.approx(0)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_prompt_in_english_holds_its_answers(task: str) -> None:
    characters: list[str] = []

    def encode(text: str) -> torch.Tensor:
        characters.extend(text)
        return torch.tensor([ord(character) for character in text])

    batch = questions(task, 128, 1, seed=0)
    found = data.spelled(batch, encode)
    text = "".join(map(chr, found.tokens[0].tolist()))
    assert text == "".join(characters)
    answers = "".join(chr(c) for c in found.tokens[0][found.answers[0]].tolist()).split()
    told = [token for token, is_answer in zip(batch.tokens[0].tolist(), batch.answers[0], strict=True) if is_answer]
    assert len(answers) == len(told) == 8
    prompt = text[: found.prompt]
    assert prompt.endswith("\nQuestions:")
    if task == "retrieve":
        for question, answer in zip(text[found.prompt :].strip().split("\n"), answers, strict=True):
            assert f"{question.rsplit(' ', 1)[0]} {answer}" in prompt
    if task == "filter":
        assert set(answers) <= {"yes", "no"}
    with pytest.raises(ValueError, match="2 sequences"):
        data.spelled(questions(task, 128, 2, seed=0), encode)


def test_a_cell_measures_every_method_on_the_same_prompts() -> None:
    params = tiny()
    found = experiment.evaluate(params, untrained(params), "retrieve", 96, 0)
    assert list(found["points"]) == params.methods
    assert all(0.3 < sparsity < 0.8 for points in found["points"].values() for _, sparsity, _ in points)
    assert found == experiment.evaluate(params, untrained(params), "retrieve", 96, 0)
    blocks = experiment.evaluate_blocks(params, untrained(params), "retrieve", 96, 0)
    assert blocks["dense"] == found["dense"] and list(blocks["points"]) == ["4", "8"]
    assert blocks["points"]["4"] == found["points"]["block"]


def test_tasks_that_the_dense_model_cannot_do_are_left_out() -> None:
    params = tiny(tasks=["retrieve", "common"])
    grid = {
        (model, task, place, seed): {"dense": 0.9 if task == "common" or place != "long" else 0.4, "points": {}}
        for model in params.models
        for task in params.tasks
        for place in evaluation.PLACES
        for seed in params.seeds
    }
    assert evaluation.learned(params, grid) == ["common"]


# ---------------------------------------------------------------------------------------------------------- real models


@pytest.fixture
def llama(tmp_path: Path) -> str:
    from tiny_pretrained import write_language_models

    return str(write_language_models(tmp_path) / "llama")


def test_a_model_of_transformers_goes_through_the_grid(llama: str) -> None:
    params = tiny(dataset="words", models=[llama, llama], rows=1, prompts=1)
    model = experiment.prepare(params, llama)
    assert model.state is None and len(model.sha256) == 64
    shape = experiment.shape(params, model)
    assert (shape.layers, shape.heads, shape.key_heads, shape.head, shape.hidden) == (2, 4, 2, 16, 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_FILLER", " x")
        found = experiment.evaluate(params, model, "common", 80, 0)
    assert all(0.2 < sparsity < 0.9 for points in found["points"].values() for _, sparsity, _ in points)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match="nowhere cannot be loaded"):
        experiment.prepare(tiny(dataset="words"), str(tmp_path / "nowhere"))
