"""The small networks of the N:M papers: sizes, names, what they must and must not see, and that they can learn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.models.gpt import GPT, next_token_loss, perplexity
from common.models.resnet_cifar import ResNetCifar
from common.models.transformer import Attention, Block
from common.models.vit import ViT


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def tiny_gpt(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(**{"vocabulary": 11, "context": 8, "width": 16, "depth": 2, "heads": 2, "ratio": 2} | changes)


# ------------------------------------------------------------------------------------------------------------ ResNet


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_resnet_has_the_published_number_of_parameters(depth, millions):
    """He et al. 2016, table 6."""
    assert count(ResNetCifar(depth=depth)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_resnet_halves_the_resolution_twice_and_keeps_an_odd_size():
    network = ResNetCifar(width=4, depth=8, classes=7, channels=1).eval()
    assert network.blocks(torch.rand(2, 4, 32, 24)).shape == (2, 16, 8, 6)
    assert network(torch.rand(2, 1, 9, 7)).shape == (2, 7)


def test_resnet_shortcut_takes_every_second_pixel_and_fills_channels_with_zeros():
    block = ResNetCifar(width=2, depth=8).blocks[1].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 6, 6)
    y = block(x)
    torch.testing.assert_close(y[:, :2], x[:, :, ::2, ::2])
    assert not y[:, 2:].any()


def test_resnet_keeps_the_size_of_its_signal_at_the_start():
    """He initialisation: the variance neither dies nor explodes through twenty layers."""
    torch.manual_seed(0)
    network = ResNetCifar().train()
    features = network.blocks(F.relu(network.norm(network.stem(torch.randn(8, 3, 32, 32)))))
    assert 0.1 < features.std().item() < 10


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="6n"):
        ResNetCifar(depth=18)
    with pytest.raises(ValueError, match="divides the size"):
        ViT(size=32, patch=5)
    with pytest.raises(ValueError, match="multiples of heads"):
        Attention(10, 3, causal=False)
    with pytest.raises(ValueError, match="vocabulary"):
        GPT(vocabulary=0)


# ------------------------------------------------------------------------------------------------------ transformers


def test_attention_is_its_formula():
    torch.manual_seed(0)
    layer, x = Attention(6, 2, causal=True), torch.randn(1, 5, 6)
    q, k, v = (f(x).view(5, 2, 3).transpose(0, 1) for f in (layer.query, layer.key, layer.value))
    scores = q @ k.transpose(1, 2) / math.sqrt(3)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = layer.out((scores.softmax(-1) @ v).transpose(0, 1).reshape(1, 5, 6))
    torch.testing.assert_close(layer(x), expected)


def test_weight_matrices_can_be_chosen_by_name():
    for network in (tiny_gpt(), ViT(width=16, depth=2)):
        names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        feed_forward = [name for name in names if ".feed_forward." in name]
        assert [name.rsplit(".", 1)[1] for name in feed_forward] == ["up", "down"] * 2
        rest = {name.rsplit(".", 1)[-1] for name in names} - {"up", "down"}
        assert rest == {"query", "key", "value", "out", "head"}


def test_block_without_its_branches_is_the_identity():
    block = Block(8, 2, 2, causal=False)
    for layer in (block.attention.out, block.feed_forward.down):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(block(x), x)


def test_vit_has_one_token_a_patch_and_refuses_another_size():
    network = ViT(size=12, patch=4, width=8, depth=1, heads=2, classes=5, channels=1)
    assert network.position.shape == (9, 8)
    assert network(torch.rand(3, 1, 12, 12)).shape == (3, 5)
    with pytest.raises(ValueError, match="16 patches; expected 9"):
        network(torch.rand(3, 1, 16, 16))


def test_vit_sees_where_a_patch_is():
    torch.manual_seed(0)
    network = ViT(size=8, patch=4, width=8, depth=1, heads=2)
    nn.init.normal_(network.position)
    image = torch.randn(1, 3, 8, 8)
    assert not torch.allclose(network(image), network(image.flip(2)))


def test_gpt_sees_no_token_to_come():
    network = tiny_gpt()
    tokens = torch.randint(11, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_gpt_refuses_a_longer_window():
    with pytest.raises(ValueError, match="at most 8"):
        tiny_gpt()(torch.zeros(1, 9, dtype=torch.long))


def test_gpt_head_is_tied_only_when_asked():
    free, tied = tiny_gpt(), tiny_gpt(tied=True)
    assert count(free) - count(tied) == 11 * 16
    assert tied.head.weight is tied.token.weight


def test_gpt_starts_near_the_uniform_distribution():
    tokens = torch.randint(11, (200,), generator=torch.Generator().manual_seed(0))
    assert perplexity(tiny_gpt(), tokens, context=8) == pytest.approx(11, rel=0.02)


class Copycat(nn.Module):
    """Says that the next token is this one + 1, with a known confidence; counts what it was asked."""

    def __init__(self, vocabulary: int, gap: float):
        super().__init__()
        self.gap = nn.Parameter(torch.tensor(gap))
        self.vocabulary, self.asked = vocabulary, 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.asked += tokens.numel()
        return self.gap * F.one_hot((tokens + 1) % self.vocabulary, self.vocabulary).float()


def test_perplexity_is_one_over_the_probability_of_the_truth():
    network = Copycat(5, gap=2.0).train()
    found = perplexity(network, torch.arange(29) % 5, context=4, batch=3)
    assert found == pytest.approx((math.exp(2) + 4) / math.exp(2), rel=1e-5)
    assert network.asked == 28, "every token but the first, once"
    assert network.training, "the mode is put back"
    with pytest.raises(ValueError, match="T > context"):
        perplexity(network, torch.arange(4), context=4)


@pytest.mark.parametrize("kind", ["resnet", "vit", "gpt"])
def test_each_network_can_learn(kind):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if kind == "gpt":
        network, window = tiny_gpt(), torch.randint(11, (4, 9), generator=generator)
        losses = _descend(network, lambda: next_token_loss(network, window))
    else:
        image, label = torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8)
        small = ViT(size=8, patch=4, width=16, depth=1, heads=2)
        network = ResNetCifar(width=4, depth=8) if kind == "resnet" else small
        losses = _descend(network, lambda: F.cross_entropy(network(image), label))
    assert losses[-1] < 0.2 * losses[0]


def _descend(network: nn.Module, loss_of) -> list[float]:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
