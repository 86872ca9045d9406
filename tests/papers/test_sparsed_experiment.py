"""SparseD's arms on small models: training, shared prompts, what is observed, and models in the layout of LLaDA."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from common import params as parameters
from common.models.stable_diffusion import MissingWeights
from papers.sparsed import evaluation, experiment, models, pretrained
from papers.sparsed.method import RELEASED, SparseD
from papers.sparsed.pretrained import DiffusionLM
from papers.sparsed.settings import Params

MODEL_CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class TinyConfig(PretrainedConfig):
    model_type = "tinydiffusion"

    def __init__(self, vocab_size=30, mask_token_id=29, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id


class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.token, self.mix = nn.Embedding(config.vocab_size, 16), nn.Linear(16, 48)
        self.head = nn.Linear(16, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, **_):
        q, k, v = self.mix(self.token(input_ids)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return MaskedLMOutput(logits=self.head(mixed))
"""


def tiny(**changes) -> Params:
    small = {"prompts": 3, "stages": ["40x3x4x4r", "64x3x3x4"], "text_steps": 5, "text_batch": 2, "text_length": 48}
    small |= {"length": 64, "generated": 32, "steps": 4, "queries": 3, "width": 16, "heads": 1}
    return dataclasses.replace(parameters.load(Params, "sparsed", "smoke"), **small | changes)


# ------------------------------------------------------------------------------------------------------------ training


def test_stages_are_read_and_mistakes_told():
    params = tiny()
    first, second = models.stages(params)
    assert (first.length, first.queries, first.steps, first.batch, first.tasks) == (40, 3, 4, 4, ("retrieve",))
    assert second.tasks == ("retrieve", "common")
    sizes = [tuple(tokens.shape) for tokens, _ in models.task_batches(params)]
    assert sizes == [(4, 40)] * 4 + [(4, 64)] * 3
    with pytest.raises(ValueError, match=r"got '64x8x3'; expected length x questions x steps x batch"):
        models.stages(tiny(stages=["64x8x3"]))


def test_the_training_is_the_same_each_time_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    params = tiny()
    (one, losses), (two, _) = (models.train(params, "tasks") for _ in range(2))
    assert len(losses) == 7 and all(torch.equal(one[name], two[name]) for name in one)
    monkeypatch.setattr("common.training.supervised.KEEP_EVERY", 2)

    class Stop(Exception):
        pass

    def bar(iterable, title, total):
        class Bar:
            def __iter__(self):
                for number, item in enumerate(iterable):
                    if number == 5:
                        raise Stop
                    yield item

            def set_postfix(self, **_):
                pass

        return Bar()

    with pytest.raises(Stop):
        models.train(params, "tasks", tmp_path / "kept.pt", progress=bar)
    assert (tmp_path / "kept.pt").is_file()
    resumed, again = models.train(params, "tasks", tmp_path / "kept.pt")
    assert again == losses and all(torch.equal(one[name], resumed[name]) for name in one)


def test_settings_are_json_and_say_what_matters():
    params = tiny()
    for kind in models.KINDS:
        plain = models.settings_of(params, kind)
        assert json.loads(json.dumps(plain)) == plain
        changed = {"tasks": {"stages": ["40x3x4x4"]}, "text": {"text_steps": 6}}[kind]
        assert models.settings_of(tiny(**changed), kind) != plain
        assert models.settings_of(tiny(prompts=9), kind) == plain


# ---------------------------------------------------------------------------------------------------------------- arms


@pytest.fixture(scope="module")
def states() -> dict:
    return {kind: models.train(tiny(), kind)[0] for kind in models.KINDS}


def test_arms_are_what_they_say():
    params = tiny()
    made = {arm: experiment.policy(params, arm, steps=10, prompt=40) for arm in experiment.ARMS}
    ours = {arm: way for arm, way in made.items() if isinstance(way, SparseD)}
    assert set(made) - set(ours) == {"dense", "window", "streaming"}
    told = {arm: (way.skip, way.isolated, way.reuse, way.compat == RELEASED) for arm, way in ours.items()}
    assert told == {
        "sparsed": (0.2, True, True, False),
        "no_skip": (0.0, True, True, False),
        "no_reuse": (0.2, True, False, False),
        "no_isolation": (0.2, False, True, False),
        "own": (0.0, True, False, False),
        "released": (0.2, True, True, True),
    }
    assert experiment.policy(params, "sparsed", steps=10, prompt=40, keep_ratio=0.5).keep_ratio == 0.5


def test_a_full_ratio_answers_as_dense_attention_does(states):
    params = tiny()
    dense = experiment.answer(params, states["tasks"], "dense", None, 1)
    full = experiment.answer(params, states["tasks"], "sparsed", 1.0, 1)
    half = experiment.answer(params, states["tasks"], "window", 0.5, 1)
    for task in params.tasks:
        assert dense[task]["density"] == full[task]["density"] == 1.0 and half[task]["density"] == 0.5
        assert dense[task]["token"] == full[task]["token"]
    losses = experiment.text_losses(params, states["text"], "dense", None, 1)["losses"]
    assert len(losses) == params.steps
    close = experiment.text_losses(params, states["text"], "own", 1.0, 1)["losses"]
    assert close == pytest.approx(losses, abs=1e-5)


def test_what_is_observed(states):
    params = tiny()
    found = experiment.observe(params, states["text"], 0)
    assert found["scores"].shape == (4, 2, 1, 4, 4) and found["similar"].shape == (3, 2, 1)
    torch.testing.assert_close(found["scores"].sum(-1), torch.ones(4, 2, 1, 4))
    assert (found["kept"][0] == 1).all() and (found["kept"] <= 1).all()  # 4 steps, skip 0.2: the first one is reused
    torch.testing.assert_close(found["best"][0], found["held"][0])
    assert (found["similar"] <= 1 + 1e-6).all() and (found["best"] > 0).all()


def test_switches_change_what_they_should(states):
    params = tiny(length=128, text_length=48, generated=64)
    table = evaluation.compat_table(params, states["text"], 0)
    assert list(table) == ["paper", *evaluation.SWITCHES, "all"]
    assert table["paper"]["changed"] == table["two_late"]["changed"] == 0
    assert table["one_more"]["density"] > table["paper"]["density"] == 0.25  # 1 of 4 and 1 of 4
    assert evaluation.starved(params, states["text"], 0, isolated=True) == pytest.approx(0.25 / 0.3)


# ---------------------------------------------------------------------------------------------------- a model as LLaDA


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A masked diffusion model with code of its own and a tokenizer, prompts as RULER writes them, and a text."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("llada")
    letters = "abcdefghijklmnopqrstuvwxyz .?"
    coder = Tokenizer(WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="?"))
    coder.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=coder, unk_token="?").save_pretrained(root / "tiny-diffusion")
    (root / "tiny-diffusion" / "modeling_tiny.py").write_text(MODEL_CODE)
    names = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    config = {"model_type": "tinydiffusion", "vocab_size": 30, "mask_token_id": 29, "auto_map": names}
    (root / "tiny-diffusion" / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {"token.weight": torch.randn(30, 16), "mix.weight": torch.randn(48, 16), "mix.bias": torch.zeros(48)}
    weights |= {"head.weight": torch.randn(30, 16), "head.bias": torch.zeros(30)}
    save_file(weights, root / "tiny-diffusion" / "model.safetensors", {"format": "pt"})
    lines = [json.dumps({"input": "find the word " + "x " * n, "outputs": ["e", "T"]}) for n in range(4)]
    (root / "vt.jsonl").write_text("\n".join(lines))
    (root / "text.txt").write_text("it was a dark and stormy night. " * 20)
    return root


def told(folder: Path, **changes) -> Params:
    return tiny(
        **{
            "dataset": "folder", "data_dir": str(folder), "model": str(folder / "tiny-diffusion"), "tasks": ["vt"],
            "prompts": 2, "generated": 16, "block_length": 8, "block_size": 16, "windows": 2,
        }
        | changes
    )  # fmt: skip


def test_a_model_with_its_own_code_is_loaded_and_reached(folder):
    params = told(folder)
    model = models.build(params, "tasks")
    assert isinstance(model, DiffusionLM) and model.mask == 29 == models.mask_of(params, "text") and not model.shifted
    [(name, sha256)] = models.identity(params).items()
    assert name == "tiny_diffusion" and len(sha256) == 64
    assert model.decode(model.encode("a word")).replace(" ", "") == "aword"
    for arm in ("dense", "sparsed", "released", "streaming"):
        found = experiment.answer(params, None, arm, None, 1)["vt"]
        assert 0 <= found["exact"] <= found["token"] <= 100
        assert len(experiment.text_losses(params, None, arm, None, 0)["losses"]) == 4
    same = [experiment.answer(params, None, arm, 1.0, 0)["vt"]["token"] for arm in ("dense", "sparsed")]
    assert same[0] == same[1]


def test_dreams_logits_are_moved_to_their_places(folder):
    model = models.build(told(folder), "tasks")
    assert isinstance(model, DiffusionLM)
    tokens = torch.tensor([[1, 2, 3, 4]])
    plain, moved = model(tokens), DiffusionLM(model.network, None, 29, shifted=True)(tokens)
    assert torch.equal(moved[:, 1:], plain[:, :-1]) and torch.equal(moved[:, 0], plain[:, 0])


def test_what_is_missing_is_said(folder, tmp_path):
    with pytest.raises(MissingWeights, match="cannot be loaded"):
        DiffusionLM.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="data_dir is empty"):
        pretrained.prompts(told(folder, data_dir=""), "vt", 0)
    with pytest.raises(FileNotFoundError, match=r"cwe.jsonl does not exist"):
        pretrained.prompts(told(folder), "cwe", 0)
    with pytest.raises(ValueError, match="got 4 lines; seed 2 expects 6"):
        pretrained.prompts(told(folder), "vt", 2)
    with pytest.raises(ValueError, match="got a prompt of"):
        experiment.answer(told(folder, length=24), None, "dense", None, 0)
    (tmp_path / "vt.jsonl").write_text('{"input": "a"}\n{}')
    with pytest.raises(ValueError, match="line 1: got"):
        pretrained.prompts(told(folder, data_dir=str(tmp_path)), "vt", 0)


def test_seeds_share_no_prompt_and_scores_ignore_case(folder):
    first, second = ({prompt for prompt, _ in pretrained.prompts(told(folder), "vt", seed)} for seed in (0, 1))
    assert len(first | second) == 4
    assert pretrained.contained("The END", ["end", "start"]) == 0.5
