"""`resparse finetune` on a tiny pipeline made here: the whole way, going on after a stop, and mistakes."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_diffusion import write_pipeline, write_stable_diffusion
from typer.testing import CliRunner

from common.finetuning import SaraModel, adapter_file
from common.models.pretrained_text_to_image import PretrainedTextToImage
from pipelines import cli, finetune_training
from pipelines.finetune_training import CHECKPOINT, captioned

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves

SMALL = ("--size", 64, "--batch", 2, "--steps", 6, "--sampling", 2, "--fraction", 0.1, "--lr", 0.01, "--device", "cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("pipeline")
    (root / "parts").mkdir()
    return write_pipeline(root / "whole", write_stable_diffusion(root / "parts"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "more/c.png"):
        Image.fromarray(draw.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / name)
    (folder / "b.txt").write_text("a chair\n")
    lines = [{"file_name": "a.png", "text": "chair"}, {"file_name": "more/c.png", "text": "a chair chair"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["finetune", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


def done(*arguments: object) -> str:
    result = invoke(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    """The one line that `main` would print."""
    error = invoke(*arguments).exception
    assert error is not None and not isinstance(error, SystemExit)
    assert cli._is_for_users(error), f"would be shown with its traceback: {error!r}"
    assert "\n" not in str(error)
    return str(error)


def test_the_command_explains_itself() -> None:
    shown = invoke("--help")
    assert shown.exit_code == 0 and "goes on where it was by the same command" in " ".join(shown.stdout.split())
    assert "finetune" in CliRunner().invoke(cli.app, ["--help"]).stdout


def test_the_whole_way(pipeline: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "barbie"
    said = done(
        "--model", pipeline, "--images", images, "--out", out, "--prompt", "chair", "--prompt", "a chair", *SMALL
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "report.json",
        "samples.png",
    ]
    with Image.open(out / "samples.png") as grid:
        assert grid.size == (2 * 64, 2 * 64)
        pixels = np.asarray(grid, dtype=int)
    assert np.abs(pixels[:64] - pixels[64:]).max() > 0, "before and after differ"
    report = json.loads((out / "report.json").read_text())
    assert len(report["losses"]) == 6 and report["samples"] == {
        "columns": ["chair", "a chair"],
        "rows": ["before", "after"],
    }
    assert report["chosen"] == round(0.1 * report["of"]) >= report["trained_at_the_end"]
    memory = report["bytes_at_peak"]
    assert memory["weights"] > 4 * report["of"] and memory["moments"] == 8 * report["chosen"]
    assert "SaraModel.from_pretrained(pipe.unet" in said and "MB for" in said
    # what it says to type next
    model = PretrainedTextToImage.from_pretrained(pipeline, device="cpu")
    base = {name: value.clone() for name, value in model.core.state_dict().items()}
    tuned = SaraModel.from_pretrained(model.core, out)
    changed = sum(int((value != base[name]).sum()) for name, value in tuned.model.state_dict().items())
    assert 0.5 * report["chosen"] < changed <= report["chosen"]
    assert all(torch.equal(value, base[name]) for name, value in tuned.unload().state_dict().items())
    assert "holds a finished adapter" in refused("--model", pipeline, "--images", images, "--out", out, *SMALL)


def test_a_stopped_training_goes_on_bit_for_bit(pipeline: str, images: Path, tmp_path: Path, monkeypatch) -> None:
    given = ("--model", pipeline, "--images", images, *SMALL)
    done(*given, "--out", tmp_path / "whole")
    keep = finetune_training._keep

    def stop(tuned, optimizer, found, options) -> None:
        keep(tuned, optimizer, found, options)
        if len(found.losses) >= 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune_training, "_keep", stop)
    stopped = invoke(*given, "--out", tmp_path / "parts")
    assert stopped.exit_code == 130 and "To go on: resparse" in stopped.stdout
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [CHECKPOINT]
    monkeypatch.setattr(finetune_training, "_keep", keep)
    said = refused(*given, "--out", tmp_path / "parts", "--batch", 3)
    assert "unfinished training with batch 2, now 3" in said
    assert "goes on after 4 steps" in done(*given, "--out", tmp_path / "parts")
    parts, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert parts.keys() == whole.keys() and all(torch.equal(value, whole[name]) for name, value in parts.items())
    assert (tmp_path / "parts" / "samples.png").read_bytes() == (tmp_path / "whole" / "samples.png").read_bytes()
    assert not (tmp_path / "parts" / CHECKPOINT).exists()


def test_a_loss_that_is_not_finite_leaves_a_state_to_go_on_from(
    pipeline: str, images: Path, tmp_path: Path, monkeypatch
) -> None:
    given = ("--model", pipeline, "--images", images, "--out", tmp_path / "out", *SMALL)
    loss, calls = finetune_training.noise_loss, []

    def broken(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return loss(*arguments) * (torch.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(finetune_training, "noise_loss", broken)
    said = refused(*given)
    assert "not finite in step 4 of 6 at learning rate 0.01; the state after step 3 is kept" in said
    assert "goes on after 3 steps" in done(*given, "--lr", 0.001)


def test_a_full_disk_at_the_end_loses_nothing(pipeline: str, images: Path, tmp_path: Path, monkeypatch) -> None:
    given = ("--model", pipeline, "--images", images, "--out", tmp_path / "out", *SMALL)
    write = adapter_file.files.write_json

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_file.files, "write_json", full)
    assert "the disk is full" in refused(*given)
    monkeypatch.setattr(adapter_file.files, "write_json", write)
    assert "goes on after 6 steps" in done(*given)


def test_a_full_disk_in_the_midst_stops_no_training(pipeline: str, images: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(finetune_training, "_keep", full)
    said = done("--model", pipeline, "--images", images, "--out", tmp_path / "out", *SMALL)
    assert "was not written (No space left on device); the training goes on" in said
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["losses"]) == 6


def test_captions_that_are_missing_are_named(images: Path) -> None:
    found = {path.name: text for path, text in captioned(images)}
    assert found == {"a.png": "chair", "b.jpg": "a chair", "c.png": "a chair chair"}
    (images / "b.txt").unlink()
    with pytest.raises(
        finetune_training.FinetuneError, match=r"1 of 3 images have no caption: b\.jpg; expected .*\.txt"
    ):
        captioned(images)
    (images / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(finetune_training.FinetuneError, match="line 1: got"):
        captioned(images)


def test_other_mistakes_have_their_line(pipeline: str, images: Path, tmp_path: Path) -> None:
    given = ("--model", pipeline, "--images", images, "--out", tmp_path / "out", *SMALL)
    assert "is no folder" in refused(*given, "--images", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(*given, "--images", tmp_path / "empty")
    assert "between 0 and 1" in refused(*given, "--fraction", 2)
    assert "selects everything" in refused(*given, "--threshold", 1e9)
    assert "cannot be loaded" in refused(*given, "--model", tmp_path / "nothing")
    shutil.copy(images / "b.txt", images / "d.png")
    (images / "d.txt").write_text("chair")
    assert "cannot be read as an image" in refused(*given)
