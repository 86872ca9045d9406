"""Attention policies inside the real classes of diffusers' video transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_video import DIM, GRID, HEADS, LAYERS, NAMES, TEXT, WORDS, Pipeline, inputs, transformer
from torch import Tensor, nn

from common.attention import AdaSpa, AttentionNotReached, Dense, Policy, adaspa, dense, dispatcher, video_attention

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves

VIDEO = GRID[0] * GRID[1] * GRID[2]
OPTIONS = {"block_size": 32, "search_steps": (2, 4)}
TOLERANCE = 1e-4  # of float32 sums in another order, through two layers of a random network


@pytest.fixture(scope="module", params=NAMES)
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return Pipeline(request.param, transformer(request.param))


@pytest.fixture(scope="module")
def hunyuan() -> Pipeline:
    return Pipeline("HunyuanVideo", transformer("HunyuanVideo"))


class Recorder(Policy):
    """Dense, and remembers its sites."""

    def __init__(self) -> None:
        self.sites: list[Any] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.restarts = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Any, meter: Any) -> Tensor:
        self.sites.append(site)
        self.shapes.add(tuple(query.shape))
        return dense(query, key, value, site)

    def restart(self) -> None:
        self.restarts += 1


def state(part: nn.Module) -> list[Any]:
    """All that a run touches."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    found: list[Any] = [sorted(part.__dict__), list(AttentionBackendName), _AttentionBackendRegistry._active_backend]
    found += [list(getattr(_AttentionBackendRegistry, t)) for t in ("_backends", "_constraints")]
    for _, module in part.named_modules():
        found += [len(module._forward_pre_hooks), len(module._forward_hooks)]
        processor = getattr(module, "processor", None)
        found += [id(processor), dict(getattr(processor, "__dict__", {}))]
    return found


def test_dense_is_the_model_itself_bit_for_bit(pipe):
    plain = pipe(2, ("cond", "uncond"))
    with video_attention(pipe, Dense()) as run:
        same = pipe(2, ("cond", "uncond"))
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    assert run.report().calls == {"dense": 2 * 2 * len(LAYERS[pipe.name])}


def test_all_tiles_kept_is_the_model_and_few_are_not(pipe):
    plain = pipe(5)
    with adaspa(pipe, 1.0, **OPTIONS) as run:
        full = pipe(5)
    assert all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(plain, full, strict=True))
    assert run.report().density == 1.0 and run.report().calls["sparse"] == 3 * len(LAYERS[pipe.name])
    with adaspa(pipe, 0.15, **OPTIONS) as run:
        sparse = pipe(5)
    assert torch.equal(plain[0], sparse[0])  # before the first search
    assert torch.allclose(plain[1], sparse[1], atol=TOLERANCE)  # the fused search gives dense output
    for a, b in zip(plain[2:], sparse[2:], strict=True):
        assert (a - b).norm() / a.norm() > 1e-3
    report = run.report()
    assert report.density is not None and 0.1 < report.density < 0.6
    assert {entry.step for entry in report.recalls} == {2, 4}
    assert set(report.densities) == {f"transformer.{layer}" for layer in LAYERS[pipe.name]}
    assert all(heads.shape == (HEADS,) for heads in report.densities.values())


def test_a_policy_is_told_where_it_is(pipe):
    policy = Recorder()
    with video_attention(pipe.transformer, policy):
        pipe(2, ("cond", "uncond"))
    layers = LAYERS[pipe.name]
    expected = [(step, cfg, layer) for step in (1, 2) for cfg in ("cond", "uncond") for layer in layers]
    assert [(site.step, site.cfg, site.layer) for site in policy.sites] == expected
    texts = {
        "HunyuanVideo": range(VIDEO, VIDEO + TEXT),
        "CogVideoX": range(TEXT),
    }
    assert {site.text for site in policy.sites} == {texts.get(pipe.name, range(0))}
    length = VIDEO + (TEXT if pipe.name in texts else 0)
    assert policy.shapes == {(2, HEADS, length, DIM)}
    assert {site.grid for site in policy.sites} == {GRID}
    for site in policy.sites:
        if pipe.name == "HunyuanVideo":
            assert site.key_mask.sum(1).tolist() == [VIDEO + words for words in WORDS]
        else:
            assert site.key_mask is None


def test_the_model_is_left_as_it_was(pipe):
    pipe = Pipeline(pipe.name, transformer(pipe.name))  # one that no other test has used
    plain, before = pipe(3), state(pipe.transformer)
    with adaspa(pipe, 0.15, search_steps=(1,), block_size=32):
        pipe(3)
        assert state(pipe.transformer) != before
    assert state(pipe.transformer) == before
    with pytest.raises(ZeroDivisionError), adaspa(pipe, 0.15, search_steps=(1,), block_size=32):
        pipe(1)
        raise ZeroDivisionError
    assert state(pipe.transformer) == before
    assert all(torch.equal(a, b) for a, b in zip(plain, pipe(3), strict=True))


def test_another_backend_chosen_before_comes_back(hunyuan):
    processor = hunyuan.transformer.transformer_blocks[0].attn.processor
    processor._attention_backend = "_native_math"
    try:
        with video_attention(hunyuan, Dense()):
            hunyuan(1)
            assert processor._attention_backend != "_native_math"
        assert processor._attention_backend == "_native_math"
    finally:
        del processor._attention_backend
    assert processor._attention_backend is None


def test_guidance_passes_have_their_own_tiles(hunyuan):
    policy = AdaSpa(0.15, (1,), block_size=32)
    with video_attention(hunyuan, policy):
        apart = hunyuan(2, ("cond", "uncond"))
    assert {cfg for _, cfg in policy._known} == {"cond", "uncond"}
    with adaspa(hunyuan, 0.15, (1,), block_size=32):
        alone = hunyuan(2, ("cond",))
    with adaspa(hunyuan, 0.15, (1,), block_size=32, share_cfg=True):
        shared = hunyuan(2, ("cond", "uncond"))
    assert torch.equal(apart[0], alone[0]) and torch.equal(apart[0], shared[0])
    assert not torch.allclose(apart[3], shared[3], atol=TOLERANCE)  # the unconditional pass with its own tiles or not


def test_timesteps_rounded_together_are_still_steps(hunyuan):
    policy = Recorder()
    with video_attention(hunyuan, policy):
        hunyuan(10, ("cond", "uncond"), last=990.0, dtype=torch.bfloat16)
    assert len(set(torch.linspace(1000, 990, 10).bfloat16().tolist())) < 10
    assert [site.step for site in policy.sites[::4]] == list(range(1, 11))


def test_generations_are_told_apart(hunyuan):
    policy = Recorder()
    with video_attention(hunyuan, policy) as run:
        hunyuan(3, (None, None))
        hunyuan(4, (None, None), seed=1)
    assert policy.restarts == 1 and run.generation == 2
    assert [site.step for site in policy.sites[::4]] == [1, 2, 3, 1, 2, 3, 4]
    assert [site.cfg for site in policy.sites[::2][:4]] == ["0", "1", "0", "1"]
    with adaspa(hunyuan, 0.15, (1,), block_size=32):
        hunyuan(2)
        second = hunyuan(2, seed=1)
    with adaspa(hunyuan, 0.15, (1,), block_size=32):
        fresh = hunyuan(2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(second, fresh, strict=True))


def test_both_transformers_of_a_pipeline_are_reached(hunyuan):
    second = transformer("HunyuanVideo")
    policy = Recorder()
    with video_attention(SimpleNamespace(transformer=hunyuan.transformer, transformer_2=second), policy):
        hunyuan(1)
        Pipeline("HunyuanVideo", second)(1)
    assert {site.layer.split(".")[0] for site in policy.sites} == {"transformer", "transformer_2"}


def test_what_cannot_be_reached_is_refused(hunyuan, monkeypatch):
    with pytest.raises(TypeError, match=r"class Linear.*CogVideoXTransformer3DModel, HunyuanVideo"):
        video_attention(nn.Linear(2, 2), Dense()).__enter__()
    with pytest.raises(TypeError, match=r"got SimpleNamespace; expected a diffusers pipeline"):
        video_attention(SimpleNamespace(unet=nn.Linear(2, 2)), Dense()).__enter__()
    with pytest.raises(AttentionNotReached, match="never called inside"), video_attention(hunyuan, Dense()):
        pass
    with (
        pytest.raises(AttentionNotReached, match=r"called 1 times and none of its attentions"),
        video_attention(hunyuan, Dense()),
    ):
        for path in LAYERS["HunyuanVideo"]:
            hunyuan.transformer.get_submodule(path).processor._attention_backend = None
        hunyuan(1)
    with video_attention(hunyuan, Dense()):
        with pytest.raises(RuntimeError, match="replaced already"):
            video_attention(hunyuan, Dense()).__enter__()
        hunyuan(1)
    before = state(hunyuan.transformer)
    monkeypatch.setattr(dispatcher, "WORKING", ("0.1.0", "0.2.0"))
    with pytest.raises(ImportError, match=r"tried with 0\.1\.0, 0\.2\.0: install"):
        video_attention(hunyuan, Dense()).__enter__()
    assert state(hunyuan.transformer) == before


def test_calls_that_cannot_be_served_are_refused(hunyuan):
    with pytest.raises(RuntimeError, match=r"gradients are asked for.*no_grad"), video_attention(hunyuan, Dense()):
        hunyuan.transformer(**inputs("HunyuanVideo"), timestep=torch.full((2,), 10.0))
    processor = hunyuan.transformer.transformer_blocks[0].attn.processor
    processor._parallel_config = object()
    try:
        with pytest.raises(RuntimeError, match="several devices"):
            video_attention(hunyuan, Dense()).__enter__()
    finally:
        del processor._parallel_config


def test_a_processor_that_attends_otherwise_is_refused():
    part = transformer("CogVideoX")
    part.transformer_blocks[0].attn1.set_processor(lambda attn, hidden, text, mask=None, rotary=None: (hidden, text))
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn1.*0 times; expected once"), video_attention(part, Dense()):
        Pipeline("CogVideoX", part)(1)


def test_fused_projections_are_served():
    pipe = Pipeline("CogVideoX", transformer("CogVideoX"))
    pipe.transformer.fuse_qkv_projections()
    plain = pipe(1)
    with video_attention(pipe, Dense()):
        assert torch.equal(pipe(1)[0], plain[0])
