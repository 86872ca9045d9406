"""`resparse sparsify` on tiny models made here: every method, the round trip, going on after a stop, and mistakes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparsify_cli import SMALL, done, invoke, refused
from tiny_pretrained import write_images, write_language_models
from torch import nn
from typer.testing import CliRunner

from common.sparsity import PackedLinear, pretrained
from common.sparsity.pretrained import load
from pipelines import cli, sparsify_report, sparsify_tasks
from pipelines.sparsify_methods import TRAINED

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves

IN_BLOCKS = 14  # of the Llama below: two layers of seven


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsify_report, "ROUNDS", (2, 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_models(tmp_path_factory.mktemp("sparsify"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def packed(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def original(folder: Path) -> Any:
    return pretrained.open_model(str(folder)).network


def test_the_command_explains_itself() -> None:
    shown = invoke("--help")
    assert shown.exit_code == 0 and "goes on where it was by the same command" in " ".join(shown.stdout.split())
    assert "sparsify" in CliRunner().invoke(cli.app, ["--help"]).stdout


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "srste", "cast"])
def test_each_method_ends_in_a_packed_model_that_loads(method: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = done("--model", place / "llama", "--data", place / "text.txt", "--method", method, "--out", out, *SMALL)
    assert f"{IN_BLOCKS} become 2:8 by {method}" in said and "lm_head: dense" in said
    assert "before   perplexity" in said and "after    perplexity" in said and f'load("{out}")' in said
    bars = {"before", "pruned", "loaded"} | ({"pruned, not trained"} if method in TRAINED else {method} - {"magnitude"})
    assert bars <= {line.strip().partition(":")[0] for line in said.splitlines() if "100%|" in line}
    assert ("by magnitude and not trained" in said) == (method in TRAINED)
    assert sorted(path.name for path in out.iterdir()) == [
        *("REPORT.md", "config.json", "packed.safetensors", "report.json", "resparse.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    model, coder = load(out)
    layers = packed(model)
    assert len(layers) == IN_BLOCKS and not model.training
    assert coder.decode(coder("some text").input_ids) == "some text"
    before = original(place / "llama")
    for name, layer in layers.items():
        dense, weight = before.get_submodule(name).weight.detach(), layer.weight.to_dense().detach()
        kept = (weight != 0).unflatten(1, (-1, 8)).sum(-1)
        assert int(kept.max()) <= 2 and torch.isfinite(weight).all()
        if method == "magnitude":
            size = dense.abs().unflatten(1, (-1, 8))
            largest = (size >= size.topk(2, dim=-1).values[..., -1:]).flatten(1)
            assert torch.equal(weight, dense * largest)
        elif method == "wanda":
            assert torch.equal(weight, dense.where(weight != 0, torch.zeros(())))
        else:
            assert not torch.equal(weight, dense.where(weight != 0, torch.zeros(())))
    with torch.no_grad():
        assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_the_report_holds_what_was_measured(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = done("--model", place / "llama", "--data", place / "text.txt", "--n", 1, "--m", 4, "--out", out, *SMALL)
    found = json.loads((out / "report.json").read_text())
    assert found["options"]["method"] == "wanda" and found["metric"] == "perplexity"
    assert found["loaded"] == pytest.approx(found["pruned"], rel=1e-4)  # sums in another order
    assert 0 < found["difference"] < 1e-4 * found["largest"] or found["difference"] == 0
    assert found["before"] != found["loaded"]
    inside = sum(p.numel() for name, p in original(place / "llama").named_parameters() if "_proj" in name)
    assert found["weights"] - found["kept"] == inside * 3 // 4
    assert found["file_bytes"] < found["dense_bytes"]
    cases = [(row["inputs"], row["model"]) for row in found["speeds"]]
    kinds = ("dense float32", "packed float32", "dense bfloat16")
    assert cases == list(itertools.product(("1 token", "16 tokens"), kinds))
    assert all(row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2] for row in found["speeds"])
    written = (out / "REPORT.md").read_text()
    for text in (
        "whole model:",
        "packed float32",
        "lm_head",
        "speed here: ",
        "unknown: not measured here",
    ):
        assert text in written and text in said


def test_a_bfloat16_model_with_conv1d_and_a_tied_head(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--model", place / "gpt2", "--data", place / "text.txt", "--out", out, *SMALL)
    assert "8 become 2:8 by magnitude" in done(*arguments, "--method", "magnitude")
    model, _ = load(out)
    assert set(packed(model)) == {
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.transformer.wte.weight
    with safe_open(out / "packed.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names


def test_chosen_layers_alone_are_pruned(place: Path, tmp_path: Path) -> None:
    chosen = ("--where", "model.layers.*.mlp.*", "--where", "*.0.self_attn.q_proj")
    done("--model", place / "llama", "--data", place / "text.txt", "--out", tmp_path / "out", *chosen, *SMALL)
    names = set(packed(load(tmp_path / "out")[0]))
    assert len(names) == 7 and {name.split(".")[3] for name in names} == {"mlp", "self_attn"}


# --------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("method", ["magnitude", "wanda", "srste"])
def test_a_classifier_of_torchvision(method: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = done(
        *("--model", "torchvision:shufflenet_v2_x0_5", "--weights", images / "shuffle.pt", "--out", out),
        *("--data", images / "photos", "--size", 32, "--n", 2, "--m", 4, "--method", method, "--steps", 3),
        *("--batch", 4, "--calibration", 6, "--device", "cpu"),
    )
    assert "15 images to train on, 3 of 3 held out" in said and "before   accuracy" in said
    assert "1 image" in said and "no packed product for this kind of layer" in said
    assert "no layer runs packed, so a difference is noise" in said
    model, coder = load(out)
    assert coder is None and not packed(model)  # convolutions, and the head stays dense
    state = torch.load(images / "shuffle.pt", weights_only=True)
    weight = model.get_submodule("stage2.0.branch2.0").weight.detach()
    assert int((weight != 0).unflatten(1, (-1, 4)).sum(2).max()) == 2
    if method != "srste":
        assert torch.equal(weight, state["stage2.0.branch2.0.weight"] * (weight != 0))
        assert torch.equal(model.get_submodule("fc").weight, state["fc.weight"])


def test_a_transformer_of_timm_from_folders_for_training_and_validation(images: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    for part, index, colour in itertools.product(("train", "val"), (0, 1), ("red", "green", "blue")):
        (tmp_path / "data" / part / colour).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / part / colour / f"{index}.png").symlink_to(images / "photos" / colour / f"{index}.png")
    name = "vit_tiny_patch16_224"
    save_file(timm.create_model(name, num_classes=3).state_dict(), tmp_path / "vit.safetensors")
    blocks = ("--where", "blocks.0.*")
    said = done(
        *("--model", f"timm:{name}", "--weights", tmp_path / "vit.safetensors", "--data", tmp_path / "data"),
        *("--out", tmp_path / "out", "--method", "cast", "--steps", 2, "--batch", 2, "--device", "cpu", *blocks),
    )
    assert "6 images to train on, 6 of 6 held out are scored, 224 x 224" in said
    model, _ = load(tmp_path / "out")
    assert set(packed(model)) == {f"blocks.0.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


# --------------------------------------------------------------------------------------------------- going on, breaking


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the batch of this step is fetched."""
    whole = sparsify_tasks.Text.batches

    def cut(self: Any, steps: int, begin: int) -> Iterator[torch.Tensor]:
        for index, batch in enumerate(whole(self, steps, begin), start=begin):
            if steps == 6 and index == step:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(sparsify_tasks.Text, "batches", cut)


def training(place: Path, out: Path, method: str = "srste") -> tuple[object, ...]:
    """GPT-2 has dropout, so that the random numbers' state matters."""
    small = [part if part != "4" else "6" for part in SMALL]
    return ("--model", place / "gpt2", "--data", place / "text.txt", "--method", method, "--out", out, *small)


@pytest.mark.parametrize("method", ["srste", "cast"])
def test_a_stopped_training_goes_on_as_if_nothing_had_been(
    method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        stopped = invoke(*training(place, tmp_path / "stopped", method))
    assert stopped.exit_code == 130 and "what was reached is kept" in stopped.output
    assert (tmp_path / "stopped" / "training.pt").is_file()
    said = invoke(*training(place, tmp_path / "stopped", method))
    assert said.exit_code == 0 and "4/6" in said.output
    assert not (tmp_path / "stopped" / "training.pt").exists()
    done(*training(place, tmp_path / "whole", method))
    ours, theirs = (load_file(tmp_path / name / "packed.safetensors") for name in ("stopped", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_broken_training_keeps_its_last_good_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        invoke(*training(place, out))
    line = refused(*training(place, out), "--lr", "1e30")
    assert "not finite in step 5 of 6 at learning rate 1e+30" in line and "the last good state, after step 3" in line
    assert "smaller --lr" in line
    assert torch.load(out / "training.pt", weights_only=True)["step"] == 3
    assert "3/6" in invoke(*training(place, out)).output and (out / "resparse.json").is_file()


def test_weights_that_run_away_are_never_taken_for_a_good_state(place: Path, tmp_path: Path) -> None:
    """A normalisation gives weights of 1e30 a finite loss: a checkpoint of them could not be gone on from."""
    arguments = ("--model", place / "llama", "--data", place / "text.txt", "--method", "srste", *SMALL)
    hidden = (*arguments, "--out", tmp_path / "hidden")
    line = refused(*hidden, "--lr", "1e30")
    assert "not finite in step 2 of 4" in line and line.endswith(
        "no step was good yet; give the same command with a smaller --lr"
    )
    done(*hidden, "--lr", "1e-4")
    line = refused(*arguments, "--out", tmp_path / "lost", "--lr", "10")
    assert line.startswith("the weights have run away (a held-out loss of") and "in step 4 of 4" in line
    assert not (tmp_path / "lost" / "resparse.json").exists()


def test_a_training_that_does_harm_ends_with_a_warning(place: Path, tmp_path: Path) -> None:
    arguments = ("--model", place / "llama", "--data", place / "text.txt", "--method", "srste", *SMALL)
    said = done(*arguments, "--out", tmp_path / "wild", "--lr", "1")  # the model is there, so it is no failure
    found = json.loads((tmp_path / "wild" / "report.json").read_text())
    assert found["loaded"] > 1000 * found["untrained"] > 1000
    (line,) = [line for line in said.splitlines() if line.startswith("warning")]
    assert f"perplexity {found['loaded']:.4g} after 4 steps, expected better than the {found['untrained']:.4g}" in line
    assert "--lr 0.1 instead of 1" in line and line in (tmp_path / "wild" / "REPORT.md").read_text()
    calm = done(*arguments, "--out", tmp_path / "calm", "--lr", "3e-4")
    found = json.loads((tmp_path / "calm" / "report.json").read_text())
    assert found["loaded"] < found["untrained"] and "warning" not in calm


def test_what_is_better_depends_on_the_metric() -> None:
    options = Namespace(lr=0.0, steps=4)
    for larger, harmed, fine in ((False, (5.0, 6.0), (6.0, 5.0)), (True, (60.0, 50.0), (50.0, 60.0))):
        task = Namespace(larger_is_better=larger, metric="metric", unit="")
        for (untrained, loaded), expected in ((harmed, 1), (fine, 0), ((5.0, 5.0), 0), ((5.0, float("nan")), 1)):
            found = sparsify_report.Findings(1.0, untrained, loaded=loaded)
            assert len(sparsify_report._warning(task, found, options)) == expected  # type: ignore[arg-type]
    assert sparsify_report._warning(task, sparsify_report.Findings(1.0, loaded=0.0), options) == []  # type: ignore[arg-type]


def test_a_training_does_not_go_on_with_other_settings(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        invoke(*training(place, tmp_path / "out"))
    line = refused(*training(place, tmp_path / "out"), "--n", 1)
    assert "holds an unfinished training with n 2, now 1; give the same as then" in line
    (tmp_path / "out" / "training.pt").write_bytes(b"cut short")
    assert "training.pt cannot be read" in refused(*training(place, tmp_path / "out"))


def test_a_loaded_model_that_computes_something_else_is_found_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrained.load

    def wrong(folder: Path) -> Any:
        model, coder = whole(folder)
        with torch.no_grad():
            for layer in packed(model).values():
                layer.values.mul_(1.1)
        return model, coder

    monkeypatch.setattr(pretrained, "load", wrong)
    line = refused("--model", place / "llama", "--data", place / "text.txt", "--out", tmp_path / "out", *SMALL)
    assert line.startswith("the loaded model computes something else: outputs differ by up to")


# ---------------------------------------------------------------------------------------------------------------- data


def test_a_text_is_split_by_position_unless_a_file_is_the_test(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 10)
    (tmp_path / "a.txt").write_text("a" * 10)
    (tmp_path / "notes.md").write_text("no text")
    assert sparsify_tasks.texts(str(tmp_path)) == ("a" * 10 + "b" * 8, "b" * 2)
    assert sparsify_tasks.texts(str(tmp_path / "a.txt")) == ("a" * 9, "a")
    (tmp_path / "test.txt").write_text("held")
    assert sparsify_tasks.texts(str(tmp_path)) == ("a" * 10 + "b" * 10, "held")


def test_the_registered_texts(real_data: Any) -> None:
    real_data("text_wikitext2")
    train, held = sparsify_tasks.texts("text_wikitext2")
    assert len(train) > 1_000_000 and len(held) > 1_000_000 and train[:2000] != held[:2000]
