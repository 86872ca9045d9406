from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from common.finetuning import SaraAdamW, SaraConfig, SaraModel, get_peft_model
from common.finetuning.selecting import targets

WORDS = 29


def unet() -> nn.Module:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def dit() -> nn.Module:
    import diffusers

    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, tie_word_embeddings=False, num_key_value_heads=2, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **sizes, **drop, **ends))


def noise_loss(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"timestep": torch.tensor([3, 700])}
    config: Any = model.config
    x = torch.randn(2, config.in_channels, 8, 8, generator=draw)
    if "cross_attention_dim" in config and config.cross_attention_dim:
        given["encoder_hidden_states"] = torch.randn(2, 5, 16, generator=draw)
    else:
        given["class_labels"] = torch.tensor([1, 4])
    return (model(x, **given).sample - x).square().mean()


def word_loss(model: nn.Module) -> Tensor:
    words = torch.randint(WORDS, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=words, labels=words).loss


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "unet": (unet, noise_loss),
    "dit": (dit, noise_loss),
    "llama": (llama, word_loss),
    "gpt2": (gpt2, word_loss),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()  # no dropout: two models are compared


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_a_real_model_are_those_of_dense_autograd(name: str) -> None:
    model, dense, loss = made(name), made(name), MODELS[name][1]
    optimizer = SaraAdamW(model, fraction=0.1, lr=1e-3)
    loss(model).backward()
    loss(dense).backward()
    grads = {key: parameter.grad for key, parameter in dense.named_parameters()}
    reached = 0
    for entries in optimizer.sparse.entries:
        found, whole = entries.gradient(), grads[entries.name]
        if found is None:  # nothing chosen here, or the model leaves this parameter out
            assert not entries.selection.count or whole is None
            continue
        expected = entries.selection.gather(whole.t() if entries.transposed else whole)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * float(whole.abs().max()) + 1e-9)
        reached += len(found)
    assert reached > 0.8 * optimizer.sparse.count


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_learns_is_saved_loaded_and_taken_back(name: str, tmp_path: Path) -> None:
    loss = MODELS[name][1]
    model = get_peft_model(made(name), SaraConfig(fraction=0.1))
    optimizer = SaraAdamW(model, lr=2e-2)
    losses = []
    for _ in range(16):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    assert list(model.model.state_dict()) == list(made(name).state_dict())
    model.save_pretrained(tmp_path / "adapter")
    loaded = SaraModel.from_pretrained(made(name), tmp_path / "adapter")
    assert loss(loaded).item() == loss(model).item()
    model.model.save_pretrained(tmp_path / "whole")  # the library's own, of the plain names
    plain = type(model.model).from_pretrained(tmp_path / "whole")
    trained = state(model.model)
    assert all(torch.equal(value, trained[key]) for key, value in plain.state_dict().items())
    base = state(made(name))
    assert all(torch.equal(value, base[key]) for key, value in model.unload().state_dict().items())


def test_embeddings_stay_frozen_and_a_tied_head_with_them() -> None:
    names = {target.name for target in targets(made("gpt2"))}
    assert "transformer.h.0.attn.c_attn.weight" in names and "transformer.ln_f.bias" in names
    assert not {name for name in names if "wte" in name or "wpe" in name or "lm_head" in name}
    assert "lm_head.weight" in {target.name for target in targets(made("llama"))}


def test_attention_projections_alone_by_their_endings() -> None:
    model = made("unet")
    found = targets(model, ["to_q", "to_k", "to_v", "to_out.0"], vectors=False)
    projections = [n for n, m in model.named_modules() if n.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    assert [target.name for target in found] == [f"{name}.weight" for name in projections] and len(found) > 8


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointed in (False, True):
        model = made("unet").train()
        optimizer = SaraAdamW(model, fraction=0.1, vectors=False, lr=1e-3)
        if checkpointed:
            model.enable_gradient_checkpointing()
        noise_loss(model).backward()
        grads.append([entries.gradient() for entries in optimizer.sparse.entries])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_model_of_bfloat16_is_trained_and_keeps_its_dtype() -> None:
    model = made("llama").bfloat16()
    optimizer = SaraAdamW(model, fraction=0.2, lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = word_loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    assert model.dtype == torch.bfloat16 and {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(128, 5))


def batch(seed: int) -> Tensor:
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def test_accelerate_accumulates_clips_and_goes_on(tmp_path: Path) -> None:
    def run(steps: range, start: str | None, end: str | None) -> dict[str, Tensor]:
        accelerate.state.AcceleratorState._reset_state(True)
        helper = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        plain = network()
        optimizer = SaraAdamW(plain, fraction=0.2, lr=3e-3)
        model, optimizer = helper.prepare(plain, optimizer)
        if start:
            helper.load_state(start)
        for step in steps:
            for micro in range(2):
                with helper.accumulate(model):
                    helper.backward(loss_of(model, batch(2 * step + micro)))
                    if helper.sync_gradients:
                        assert helper.clip_grad_norm_(model.parameters(), 1.0) > 0
                    optimizer.step()
                    optimizer.zero_grad()
        if end:
            helper.save_state(end)
        return state(plain)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = run(range(4), None, None)
        run(range(2), None, str(tmp_path / "half"))
        resumed = run(range(2, 4), str(tmp_path / "half"), None)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    model = network()
    optimizer = SaraAdamW(model, fraction=0.2, lr=3e-3)
    for step in range(4):
        optimizer.zero_grad()
        for micro in range(2):
            (loss_of(model, batch(2 * step + micro)) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, value in state(model).items():
        torch.testing.assert_close(value, whole[name])
