"""`resparse sparsify` refuses what cannot work in one line that says what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sparsify_cli import SMALL, done, refused
from tiny_pretrained import write_images, write_language_models

from common.sparsity import PackedFileError, pretrained
from common.sparsity.pretrained import load
from pipelines import sparsify_report

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsify_report, "ROUNDS", (2, 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_models(tmp_path_factory.mktemp("sparsify"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", ""), "--data is empty"),
        (("--model", ""), "--model is empty"),
        (("--n", 9), "got 9:8; expected 1 <= n < m <= 256"),
        (("--m", 7), "7 does not divide its 64 input channels"),
        (("--where", "*.mlp.down_proj", "--m", 64), "64 does not divide its 96 input channels; choose another m"),
        (("--where", "model.layers.0.mlp.up"), "unknown layer 'model.layers.0.mlp.up'; expected one of 15 names"),
        (("--method", "sparsgpt"), "expected one of magnitude, wanda, sparsegpt, srste, cast; did you mean sparsegpt?"),
        (("--device", "tpu"), "--device tpu: expected cpu"),
        (("--length", 65), "--length 65: the model sees 64 tokens at most"),
        (("--data", "nowhere.txt"), "--data nowhere.txt: no such file or folder, and no registered text"),
        (("--model", "./nowhere"), "./nowhere: no such folder; expected a model in the layout of transformers"),
        (("--weights", "x.pt"), "a language model's weights lie in its folder"),
        (("--model", "torchvision:resnet19"), "no folder of classes"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: tuple[object, ...], message: str, place: Path, tmp_path: Path
) -> None:
    usual = ("--model", place / "llama", "--data", place / "text.txt", "--out", tmp_path / "out", *SMALL)
    assert message in refused(*usual, *arguments)
    assert not (tmp_path / "out").exists()


def test_missing_tokenizer_and_short_texts(place: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    usual = ("--data", place / "text.txt", *SMALL)
    assert "holds no config.json" in refused("--model", bare, *usual)
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(place / "gpt2" / name)
    assert "holds no tokenizer" in refused("--model", bare, *usual)
    (tmp_path / "short.txt").write_text("a" * 150)
    line = refused("--model", place / "llama", "--data", tmp_path / "short.txt", *SMALL)
    assert "is too short: 15 tokens held out, expected more than the context of 16" in line
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    assert "no text in UTF-8" in refused("--model", place / "llama", "--data", tmp_path / "latin.txt", *SMALL)


def test_a_model_that_is_not_here_off_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def gone(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub\nand more lines of advice")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", gone)
    line = refused("--model", "nobody/nothing", "--data", place / "text.txt", *SMALL)
    assert "nobody/nothing cannot be loaded (We couldn't connect to the hub). Download it once on a machine" in line


def test_a_folder_that_holds_something_else_is_left_alone(place: Path, tmp_path: Path) -> None:
    usual = ("--model", place / "llama", "--data", place / "text.txt", *SMALL)
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds something else already; expected a new folder" in refused(*usual, "--out", tmp_path)
    assert "is a file; expected a new folder" in refused(*usual, "--out", tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    done(*usual, "--out", tmp_path / "out", "--method", "magnitude")
    assert "holds a finished model already" in refused(*usual, "--out", tmp_path / "out")


def test_classifiers_that_do_not_fit(images: Path, tmp_path: Path) -> None:
    usual = ("--data", images / "photos", "--size", 32, "--batch", 4, "--device", "cpu", "--out", tmp_path / "out")
    ours = ("--model", "torchvision:shufflenet_v2_x0_5", "--weights", images / "shuffle.pt", *usual)
    assert "did you mean 'resnet18'?" in refused("--model", "torchvision:resnet19", *usual)
    assert "no such file; expected a state dict" in refused(*ours, "--weights", "nowhere.pt")
    line = refused(*ours, "--model", "torchvision:shufflenet_v2_x1_0")
    assert "in shufflenet_v2_x1_0 for 3 classes" in line and "expected the state dict of that model" in line
    assert "no layer of shufflenet_v2_x0_5 is left for cast" in refused(*ours, "--method", "cast")
    (tmp_path / "two" / "a").mkdir(parents=True)
    (tmp_path / "two" / "b").mkdir()
    line = refused(*ours, "--data", tmp_path / "two")
    assert "for 2 classes" in line and not (tmp_path / "out").exists()
    (tmp_path / "notes.pt").write_text("no tensors")
    assert "is no file of tensors alone; expected a state dict" in refused(*ours, "--weights", tmp_path / "notes.pt")
    (tmp_path / "half" / "train" / "a").mkdir(parents=True)
    assert "there is a train and no val" in refused(*ours, "--data", tmp_path / "half")


def test_an_image_that_is_cut_short_is_named(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "photos", tmp_path / "photos")
    for file in (tmp_path / "photos" / "red").iterdir():
        file.write_bytes(file.read_bytes()[:-2000])
    ours = ("--model", "torchvision:shufflenet_v2_x0_5", "--weights", images / "shuffle.pt", "--size", 32)
    line = refused(*ours, "--data", tmp_path / "photos", "--batch", 4, "--device", "cpu", "--out", tmp_path / "out")
    assert str(tmp_path / "photos" / "red") in line and "cannot be read as an image" in line


def test_load_refuses_what_it_cannot_read(place: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder written by `resparse sparsify`"):
        load(tmp_path)
    out = tmp_path / "out"
    done("--model", place / "llama", "--data", place / "text.txt", "--out", out, "--method", "magnitude", *SMALL)
    whole, about = (out / "packed.safetensors").read_bytes(), json.loads((out / "resparse.json").read_text())
    (out / "packed.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PackedFileError, match="cut short"):
        load(out)
    (out / "packed.safetensors").write_bytes(whole)
    for broken, message in (
        (about | {"version": 2}, "version 2; this code reads"),
        ({key: value for key, value in about.items() if key != "kind"}, r"damaged \(no kind\)"),
        (about | {"dtype": "int3"}, r"damaged \(kind or dtype\)"),
        (about | {"n": 1}, "do not belong together .* expected at most 1"),
        (7, "no JSON of a model"),
    ):
        (out / "resparse.json").write_text(json.dumps(broken))
        with pytest.raises(PackedFileError, match=message):
            load(out)
    (out / "resparse.json").write_text(json.dumps(about))
    assert load(out)
    (out / "tokenizer.json").unlink()
    with pytest.raises(pretrained.MissingWeights, match="holds no tokenizer"):
        load(out)
