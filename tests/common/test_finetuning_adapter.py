from __future__ import annotations

import errno
import json
import math
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import files
from common.finetuning import (
    AdapterFileError,
    SaraAdamW,
    SaraConfig,
    SaraModel,
    add_weighted,
    get_peft_model,
)
from common.finetuning.adapter_file import CONFIG, WEIGHTS, Adapter


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(32, 130), nn.Linear(130, 5))
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def trained(config: SaraConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float32, steps: int = 4):
    model = get_peft_model(network(dtype=dtype), config or SaraConfig(fraction=0.1, seed=seed))
    optimizer = SaraAdamW(model, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(batch(dtype)) - seed).square().mean().backward()
        optimizer.step()
    return model, optimizer


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unload_gives_the_base_back_bit_for_bit(dtype: torch.dtype) -> None:
    model, _ = trained(dtype=dtype)
    assert not same(state(model.model), state(network(dtype=dtype)))
    for scale in (1, 0.3):
        model.set_scale(scale)
    plain = model.unload()
    assert same(state(plain), state(network(dtype=dtype)))
    assert type(plain[0]) is nn.Conv2d and all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = trained(dtype=dtype)
    model.set_scale(0.5)  # what was trained is saved, whatever is used now
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"], "nothing is left beside it"
    model.set_scale(1)
    loaded = SaraModel.from_pretrained(network(dtype=dtype), tmp_path / "adapter")
    assert same(state(loaded.model), state(model.model))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded(batch(dtype)).requires_grad
    assert loaded.peft_config == model.peft_config
    assert loaded.sparse.theta == model.sparse.theta
    assert same(state(loaded.unload()), state(network(dtype=dtype)))


def test_a_loaded_adapter_is_trained_on_like_the_first(tmp_path: Path) -> None:
    model, optimizer = trained(SaraConfig(fraction=0.1, progressive_at=None))
    model.save_pretrained(tmp_path / "adapter")
    saved = optimizer.state_dict()
    loaded = SaraModel.from_pretrained(network(), tmp_path / "adapter", is_trainable=True)
    resumed = SaraAdamW(loaded, lr=1e-2)
    resumed.load_state_dict(saved)
    for one, other in ((model, optimizer), (loaded, resumed)):
        other.zero_grad()
        one(batch()).square().mean().backward()
        other.step()
    assert same(state(loaded.model), state(model.model))
    assert same(state(loaded.unload()), state(network()))


def test_after_the_adjustment_all_that_was_changed_is_saved(tmp_path: Path) -> None:
    model = get_peft_model(network(), SaraConfig(fraction=0.2, progressive_at=0.5))
    optimizer = SaraAdamW(model, lr=2e-3, total_steps=6)
    for _ in range(6):
        optimizer.zero_grad()
        (model(batch()) - 1).square().mean().backward()
        optimizer.step()
    chosen = sum(entries.chosen.count for entries in model.sparse.entries)
    assert model.sparse.count < chosen
    model.save_pretrained(tmp_path / "adapter")
    loaded = SaraModel.from_pretrained(network(), tmp_path / "adapter")
    assert same(state(loaded.model), state(model.model))
    assert same(state(model.unload()), state(network()))


def test_an_entry_takes_two_bytes_of_place_and_two_or_four_of_value(tmp_path: Path) -> None:
    model, _ = trained()
    count = model.sparse.count
    sizes = {}
    for dtype, value in ((None, 4), (torch.float16, 2), (torch.bfloat16, 2)):
        model.save_pretrained(tmp_path / str(dtype), dtype=dtype)
        tensors = load_file(tmp_path / str(dtype) / WEIGHTS)
        sizes[dtype] = sum(t.nbytes for name, t in tensors.items() if not name.endswith("starts"))
        assert sizes[dtype] == count * (2 + value)
    rounded = SaraModel.from_pretrained(network(), tmp_path / "torch.float16")
    base = state(network())
    moved = max(float((value - base[name]).abs().max()) for name, value in state(model.model).items())
    for name, value in state(model.model).items():
        # half a unit in the last of eleven binary digits of the largest difference
        torch.testing.assert_close(state(rounded.model)[name], value, rtol=0, atol=moved * 2**-11 + 1e-8)
    with pytest.raises(ValueError, match=r"expected None, torch\.float16"):
        model.save_pretrained(tmp_path / "no", dtype=torch.int8)


def test_scale_is_linear_in_the_difference_and_exact_at_its_ends() -> None:
    model, _ = trained()
    tuned, base = state(model.model), state(network())
    for scale in (0.5, 2.0, -1.0):
        model.set_scale(scale)
        for name, value in state(model.model).items():
            expected = base[name].double() + scale * (tuned[name].double() - base[name].double())
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)
    model.set_scale(0)
    assert same(state(model.model), base)
    model.set_scale(1)
    assert same(state(model.model), tuned)
    with pytest.raises(ValueError, match="expected a finite number"):
        model.set_scale(math.nan)


def test_disabled_it_is_the_base_and_then_what_it_was_even_after_an_error() -> None:
    model, _ = trained()
    tuned = state(model.model)
    with pytest.raises(KeyError), model.disable_adapter():
        assert torch.equal(model(batch()), network()(batch()))
        raise KeyError
    assert same(state(model.model), tuned) and model.scale == 1


def test_training_while_scaled_is_refused_and_changes_nothing() -> None:
    model, optimizer = trained()
    model.set_scale(0.5)
    before = state(model.model)
    model(batch()).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"scaled or disabled.*call set_scale\(1\)"):
        optimizer.step()
    assert same(state(model.model), before)


def test_disabling_between_forward_and_backward_is_caught() -> None:
    model, _ = trained()
    loss = model(batch()).square().mean()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_merge_gives_a_plain_model_with_the_adapter_in_it() -> None:
    model, _ = trained()
    model.set_scale(0.8)
    out = model(batch()).detach()
    plain = model.merge()
    assert type(plain[3]) is nn.Linear and torch.equal(plain(batch()), out)
    assert list(plain.state_dict()) == list(network().state_dict())


def test_adapters_are_added_with_their_weights(tmp_path: Path) -> None:
    ends, base = [], state(network())
    for seed in (1, 2):
        model, _ = trained(SaraConfig(fraction=0.1, select="random", seed=seed), seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        ends.append(state(model.model))
    both = add_weighted(network(), [tmp_path / "1", tmp_path / "2"], [0.6, 0.4])
    for name, value in state(both.model).items():
        first, second = (end[name].double() - base[name].double() for end in ends)
        expected = base[name].double() + 0.6 * first + 0.4 * second
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)
    both.save_pretrained(tmp_path / "both")
    again = SaraModel.from_pretrained(network(), tmp_path / "both")
    assert same(state(again.model), state(both.model))
    assert same(state(both.unload()), base)
    with pytest.raises(ValueError, match="got 2 adapters and 1 weights"):
        add_weighted(network(), [tmp_path / "1", tmp_path / "2"], [1.0])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: network(seed=9), "another base: '0.weight' differs"),
        (lambda: network().bfloat16(), r"torch.float32 .* and torch.bfloat16 .*load the base in torch.float32"),
        (lambda: network()[:3], "changes '3.weight', which this model lacks"),
        (lambda: nn.Sequential(*network()[:3], nn.Linear(32, 131), nn.Linear(131, 5)), r"\[130, 32\].*\[131, 32\]"),
    ],
)
def test_another_base_is_refused_and_stays_what_it_is(other, words: str, tmp_path: Path) -> None:
    trained()[0].save_pretrained(tmp_path / "adapter")
    model = other()
    before = state(model)
    with pytest.raises(AdapterFileError, match=words):
        SaraModel.from_pretrained(model, tmp_path / "adapter")
    assert same(state(model), before) and type(model[0]) is nn.Conv2d


def test_a_base_that_differs_in_one_frozen_bit_is_another_one(tmp_path: Path) -> None:
    model, _ = trained()
    model.save_pretrained(tmp_path / "adapter")
    near = network()
    entries = next(e for e in model.sparse.entries if e.name == "3.weight")
    frozen = int((~entries.chosen.mask()).flatten().nonzero()[0])
    flat = near[3].weight.data.view(-1)
    flat[frozen] = torch.nextafter(flat[frozen], torch.tensor(9.0))
    with pytest.raises(AdapterFileError, match=r"another base: '3\.weight'"):
        SaraModel.from_pretrained(near, tmp_path / "adapter")


def test_a_full_disk_leaves_the_old_adapter_and_the_model(tmp_path: Path, monkeypatch) -> None:
    model, _ = trained()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    optimizer = SaraAdamW(model, lr=1e-2)
    model(batch()).square().mean().backward()
    optimizer.step()
    tuned = state(model.model)
    write = files.write_json

    def full(path: Path, content: object) -> None:  # when the second file is written
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match=r"was not saved to .*: the disk is full; .* untouched: make room") as error:
        model.save_pretrained(folder)
    assert error.value.errno == errno.ENOSPC and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    monkeypatch.setattr(files, "write_json", write)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the system itself refuses in the midst of a file
    try:
        with pytest.raises(OSError, match="was not saved"):
            model.save_pretrained(folder)
        with pytest.raises(OSError, match="was not saved"):
            model.save_pretrained(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert list(tmp_path.iterdir()) == [folder] and same(state(model.model), tuned)
    model.save_pretrained(folder)
    assert same(state(SaraModel.from_pretrained(network(), folder).model), tuned)


def rewritten(folder: Path, change) -> None:
    """The file with its tensors and header changed."""
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        header = dict(opened.metadata())
    tensors = load_file(folder / WEIGHTS)
    change(tensors, header)
    save_file(tensors, folder / WEIGHTS, header)


def _outside(tensors, header):
    tensors["3.weight.offsets"][-1] = 127 * 128 + 127  # row 127 of a last tile with two rows


DAMAGES = {
    "version": (lambda t, h: h.update(version="7"), "version '7'; expected '1': update"),
    "format": (lambda t, h: h.update(format="other"), "format 'other'"),
    "header": (lambda t, h: h.update(tensors="{"), "damaged header"),
    "outside": (_outside, r"damaged at '3.weight'"),
    "twice": (lambda t, h: t["3.weight.offsets"].__setitem__(1, t["3.weight.offsets"][0]), "damaged at '3.weight'"),
    "short": (lambda t, h: t.update({"3.weight.values": t["3.weight.values"][:-1].clone()}), "damaged at '3.weight'"),
    "gone": (lambda t, h: t.pop("3.weight.starts"), "damaged at '3.weight'"),
    "nan": (lambda t, h: t["3.weight.values"].__setitem__(0, torch.nan), "not finite"),
    "negative": (lambda t, h: t["3.weight.offsets"].__setitem__(0, -5), "damaged at '3.weight'"),
    "starts": (lambda t, h: t["3.weight.starts"].__setitem__(1, 10**6), "damaged at '3.weight'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_one_line(damage: str, tmp_path: Path) -> None:
    trained()[0].save_pretrained(tmp_path / "adapter")
    change, words = DAMAGES[damage]
    rewritten(tmp_path / "adapter", change)
    model = network()
    with pytest.raises(AdapterFileError, match=words) as error:
        SaraModel.from_pretrained(model, tmp_path / "adapter")
    assert same(state(model), state(network())) and "\n" not in str(error.value)


def test_a_file_that_is_cut_or_missing_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    trained()[0].save_pretrained(folder)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-9])
    with pytest.raises(AdapterFileError, match="cut short"):
        Adapter.load(folder)
    (folder / WEIGHTS).write_bytes(whole)
    stored = json.loads((folder / CONFIG).read_text())
    assert stored["peft_type"] == "SARA" and stored["fraction"] == 0.1
    (folder / CONFIG).write_text("{")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json cannot be read"):
        Adapter.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(AdapterFileError, match="is not there; expected a folder written by save_pretrained"):
        SaraModel.from_pretrained(network(), folder)


def test_it_speaks_as_peft_does(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = trained()
    model.print_trainable_parameters()
    total = sum(p.numel() for p in network().parameters())
    count = round(0.1 * total)
    expected = f"trainable params: {count:,d} || all params: {total:,d} || trainable%: {100 * count / total:.4f}\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = model.nothing_such
