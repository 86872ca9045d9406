"""Counting steps, refusing what is not served, the report, and language models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attention import (
    AdaSpa,
    AttentionNotReached,
    Dense,
    Meter,
    Policy,
    Run,
    Site,
    dense,
    language_attention,
    meter,
)


class Recorder(Policy):
    """Dense, and remembers its sites."""

    def __init__(self) -> None:
        self.sites: list[Site] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        self.sites.append(site)
        return dense(query, key, value, site)


def steps(calls: list[tuple[float, str | None]]) -> list[tuple[int, int, str]]:
    """(generation, step, pass) of forward passes with these timesteps and names."""
    policy = Recorder()
    run, found = Run(policy), []
    for timestep, name in calls:
        run.begin(timestep, name)
        run.attend(*[torch.zeros(1, 1, 4, 2)] * 3, layer="a")
        run.end()
        found.append((run.generation, run.step, policy.sites[-1].cfg))
    return found


def test_a_new_timestep_is_a_new_step_and_others_are_passes():
    assert steps([(9, None), (9, None), (5, None), (5, None)]) == [(1, 1, "0"), (1, 1, "1"), (1, 2, "0"), (1, 2, "1")]


def test_a_named_pass_that_comes_again_is_a_new_step():
    # HunyuanVideo's timesteps in bfloat16, or Heun's two evaluations at one timestep
    calls = [(9.0, "cond"), (9.0, "uncond"), (9.0, "cond"), (9.0, "uncond"), (5.0, "cond")]
    assert [step for _, step, _ in steps(calls)] == [1, 1, 2, 2, 3]


def test_timesteps_that_turn_back_begin_a_generation():
    falling = [(t, None) for t in (9.0, 5.0, 1.0, 9.0, 5.0, 9.0)]
    assert [entry[:2] for entry in steps(falling)] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)]
    rising = [(t, None) for t in (1.0, 5.0, 9.0, 1.0)]  # an inversion
    assert [entry[:2] for entry in steps(rising)] == [(1, 1), (1, 2), (1, 3), (2, 1)]


X = torch.zeros(2, 1, 6, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 0.1}, ValueError, r"'a': got dropout 0\.1"),
        ({"is_causal": True}, ValueError, "got causal attention"),
        ({"text": range(7)}, ValueError, "got 7 text tokens in a sequence of 6"),
        ({"query": X.clone().requires_grad_()}, RuntimeError, r"gradients are asked for.*torch\.no_grad"),
        ({"query": X[:, :, :1]}, ValueError, "got 1 queries and 6 keys; expected self-attention"),
        ({"attn_mask": torch.zeros(2, 1, 1, 6)}, ValueError, r"got a mask torch\.float32 \[2, 1, 1, 6\]"),
        ({"attn_mask": torch.ones(2, 1, 6, 6).tril().bool()}, ValueError, r"expected none, or which keys"),
        ({"attn_mask": torch.ones(2, 3, 1, 6, dtype=torch.bool)}, ValueError, r"bool \[2, 1, 1, 6\] or \[2, 6\]"),
        ({"attn_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"got a mask torch\.bool \[2, 5\]"),
    ],
)
def test_what_is_not_served_is_refused(options, error, message):
    run = Run(Dense())
    run.begin(1.0, None)
    with pytest.raises(error, match=message):
        run.attend(**{"query": X, "key": X, "value": X, "layer": "a"} | options)


def test_an_attention_outside_of_a_forward_pass_is_refused():
    with pytest.raises(RuntimeError, match="outside of the model's forward pass"):
        Run(Dense()).attend(X, X, X, layer="a")
    with pytest.raises(RuntimeError, match=r"outside of an attention; use it inside Policy\.attend"):
        Meter().density(torch.ones(1, 1))


@pytest.mark.parametrize("shape", [(2, 6), (2, 1, 1, 6), (1, 1, 1, 6), (2, 1, 6, 6)])
def test_masks_of_keys_are_heard(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 4:] = False
    policy = Recorder()
    run = Run(policy)
    run.begin(1.0, None)
    q, k, v = torch.randn(3, 2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    out = run.attend(q, k, v, layer="a", attn_mask=mask)
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k[:, :, :4], v[:, :, :4]), atol=1e-6)
    found = policy.sites[0].key_mask
    assert found is not None and found.tolist() == [[True] * 4 + [False] * 2] * 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes only when told."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter, "_now", lambda: clock.now)
    return clock


class Paced(Policy):
    """Takes 6 s for dense attention and 2 s for sparse, of which a quarter of the tiles is kept."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock = clock

    def attend(self, query: Tensor, key: Tensor, value: Tensor, site: Site, meter: Meter) -> Tensor:
        name = "dense" if site.step < 3 else "sparse"
        with meter.phase(name):
            self.clock.now += {"dense": 6.0, "sparse": 2.0}[name]
        if name == "sparse":
            meter.density(torch.tensor([[0.2, 0.3], [0.2, 0.3]]))
            meter.recall(torch.tensor([[0.9, 0.8]]))
        return query


def test_the_report_adds_up(clock):
    run = Run(Paced(clock))
    x = torch.zeros(2, 2, 6, 4)
    for step in range(1, 6):
        run.begin(-step, None)
        clock.now += 2.0
        run.attend(x, x, x, layer="blocks.0")
        run.end()
        clock.now += 1.0
    run.stop()
    clock.now += 50.0
    report = run.report()
    assert report.seconds == {"dense": 12.0, "sparse": 6.0, "other": 10.0, "outside": 5.0}
    assert report.calls == {"dense": 2, "sparse": 3} and report.forwards == 5
    assert report.densities["blocks.0"].tolist() == pytest.approx([0.2, 0.3])
    assert report.share == 6 / 8 and report.bound == 4.0
    assert report.bound_at_density == pytest.approx(1 / (1 - 0.75 * 0.75))
    assert report.speedup == 2.0
    text = str(report)
    for line in (
        "dense          12.000   36.4%         2",
        "total          33.000                 5 forward passes",
        "blocks.0    0.250  0.200 to 0.300              0.850        0.800",
        "attention is 75.0% of a dense forward pass, so at most 4.00 times faster; 2.29 times at this density; ",
        "; measured 2.00 times",
    ):
        assert line in text, text


def test_the_report_claims_nothing_it_did_not_see(clock):
    run = Run(Dense())
    run.begin(1.0, None)
    with pytest.raises(ValueError):
        run.attend(X, X, X, layer="a", is_causal=True)
    clock.now += 1.0
    report = run.report()
    assert report.forwards == 0 and report.share is None and report.bound is None and report.speedup is None
    assert "nothing was sparse" in str(report) and "nothing to compare with" in str(report)


class Block(nn.Module):
    """Of a language model in LLaDA's manner: torch's attention, in both directions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.project, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(4 * q, k, v, attn_mask=None).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(50, 32), nn.Sequential(Block(32, 2), Block(32, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.embed(tokens))


TOKENS = torch.randint(50, (2, 150), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def denoise(model: Any, count: int) -> list[Tensor]:
    return [model(TOKENS.roll(step, -1)) for step in range(count)]


def test_language_models_are_reached_through_torch():
    model = Model()
    plain = denoise(model, 4)
    with language_attention(model, Dense()) as run:
        assert all(torch.equal(a, b) for a, b in zip(plain, denoise(model, 4), strict=True))
    assert run.report().calls == {"dense": 8} and "forward" not in vars(model)
    policy = Recorder()
    with language_attention(model, policy, passes=2) as run:
        denoise(model, 4)
        run.restart()
        denoise(model, 2)
    assert [(s.step, s.cfg, s.layer) for s in policy.sites[:5]] == [
        (1, "0", "0"),
        (1, "0", "1"),
        (1, "1", "0"),
        (1, "1", "1"),
        (2, "0", "0"),
    ]
    assert policy.sites[-1].step == 1 and run.generation == 2
    with language_attention(model, AdaSpa(1.0, (2,), block_size=32)):
        full = denoise(model, 4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, full, strict=True))
    with language_attention(model, AdaSpa(0.2, (2,), block_size=32)):
        sparse = denoise(model, 4)
    assert torch.equal(plain[0], sparse[0]) and not torch.allclose(plain[3], sparse[3], atol=1e-2)


def test_language_models_are_left_as_they_were_and_errors_said():
    model = Model()
    with pytest.raises(ZeroDivisionError), language_attention(model, Dense()):
        raise ZeroDivisionError
    assert "forward" not in vars(model)
    with pytest.raises(AttentionNotReached, match="never called"), language_attention(model, Dense()):
        pass
    with pytest.raises(AttentionNotReached, match="none of its attentions"):
        linear = nn.Linear(2, 2)
        with language_attention(linear, Dense()):
            linear(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="got passes 0"):
        language_attention(model, Dense(), passes=0).__enter__()
    with language_attention(model, Dense()):
        with pytest.raises(RuntimeError, match="replaced already"):
            language_attention(model, Dense()).__enter__()
        denoise(model, 1)


@pytest.mark.filterwarnings("default")  # another package warns about itself
def test_models_of_transformers_are_reached():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config._attn_implementation = "sdpa"
    model = BertModel(config).eval()
    present = torch.ones(2, 150, dtype=torch.long)
    present[1, 100:] = 0
    policy = Recorder()
    with torch.no_grad():
        plain = model(TOKENS, attention_mask=present).last_hidden_state
        with language_attention(model, policy):
            same = model(TOKENS, attention_mask=present).last_hidden_state
    assert torch.allclose(plain, same, atol=1e-5) and len(policy.sites) == 2
    mask = policy.sites[0].key_mask
    assert mask is not None and mask.sum(1).tolist() == [150, 100]
