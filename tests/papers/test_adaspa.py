"""AdaSpa: the method on known cases, the policies it is compared with, videos with captions, and what things cost."""

from __future__ import annotations

import dataclasses
import math

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

from common import params as parameters
from common.attention import Meter, Site
from kernels import attention
from papers.adaspa import baselines, cost, data, experiment, figures, method, network, patterns, planted, quality
from papers.adaspa.settings import Params

GRID, TEXT = (4, 4, 4), range(64, 72)


@pytest.fixture(scope="module")
def smoke() -> Params:
    return parameters.load(Params, "adaspa", "smoke")


def head(length: int = 72, heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 1, heads, length, 16, generator=torch.Generator().manual_seed(seed))
    return 2 * query, 2 * key, value


def attend(policy: baselines.Window, step: int, *inputs: Tensor, layer: str = "0") -> Tensor:
    meter = Meter()
    site = Site(layer, step, "0", TEXT, GRID)
    meter.enter(site, 1)
    return policy.attend(*inputs, site, meter)


# ---- method


def test_dense_steps_are_dense_and_the_first_search_too():
    query, key, value = head()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    memory = method.Memory()
    for step in (1, 2, 3):
        out = method.attend(memory, step, query, key, value, search_steps=(3, 5), block=8, text=TEXT)
        assert (out - expected).abs().max() < 1e-5
    assert memory.tiles is not None
    sparse = method.attend(memory, 4, query, key, value, search_steps=(3, 5), block=8, text=TEXT)
    assert (sparse - expected).abs().max() > 1e-2


def test_steps_out_of_order_are_refused():
    with pytest.raises(ValueError, match="steps in order"):
        method.attend(method.Memory(), 4, *head(), search_steps=(3,), block=8)


def test_tile_weights_sum_to_the_tokens_of_a_row_and_of_nothing_else():
    query, key, value = head(70)
    weights = method.tile_weights(query, key, method.dense_attention(query, key, value)[1], 16)
    assert weights.shape == (1, 2, 5, 5)
    assert torch.allclose(weights.sum(-1), torch.tensor([16.0, 16, 16, 16, 6]).expand(1, 2, 5), atol=1e-4)


def test_every_row_keeps_as_many_tiles_and_the_text_comes_on_top():
    weights = torch.rand(1, 2, 10, 10, generator=torch.Generator().manual_seed(0))
    nothing, sink = torch.zeros(10, 10, dtype=torch.bool), method.text_tiles(80, range(76, 80), 8)
    keep = torch.tensor([[0.2, 0.5]])
    kept = method.select(weights, keep, nothing)
    assert kept.sum(-1).unique(dim=-1).squeeze().tolist() == [2, 5]
    assert (kept.sum(-1)[0, 0] == 2).all() and (kept.sum(-1)[0, 1] == 5).all()
    worst_kept = weights.masked_fill(~kept, 2).amin(-1)
    assert (weights.masked_fill(kept, -1).amax(-1) < worst_kept).all()
    with_text = method.select(weights, keep, sink)
    assert torch.equal(with_text, kept | sink) and sink.sum() == 19


@pytest.mark.parametrize(
    ("recalls", "expected"),
    [
        ([0.9, 0.5, 0.85, 0.3], [0.1, 0.3, 0.1, 0.3]),  # two easy heads: two up, two down
        ([0.9, 0.5, 0.7, 0.3], [0.1, 0.2, 0.2, 0.3]),
        ([0.9, 0.95, 0.99], [0.2, 0.2, 0.1]),  # three easy of three: one is half
        ([0.1, 0.2], [0.2, 0.2]),
    ],
)
def test_tiers_give_the_poor_what_they_take_from_the_rich(recalls, expected):
    keep = method.kept_by_head(torch.tensor([recalls]), 0.2, 0.8)[0]
    if len(recalls) == 3:  # the poorest of the three gets what the richest gives
        expected = [0.3, 0.2, 0.1]
    assert torch.allclose(keep, torch.tensor(expected))
    assert keep.mean().item() == pytest.approx(0.2)
    assert method.kept_by_head(torch.tensor([recalls]), 0.9, 0.0).max() <= 1


def test_a_sparse_softmax_is_over_what_is_left():
    query, key, value = head(32)
    tiles = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    tiles[..., 1] = True
    out = method.sparse_attention(query, key, value, tiles, 8)
    alone = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, 8:16], value[:, :, 8:16])
    assert torch.allclose(out, alone, atol=1e-5)


# ---- baselines


@pytest.mark.parametrize("kind", [baselines.Window, baselines.MInference, baselines.SparseVideoGen])
def test_a_baseline_is_dense_first_and_always_when_all_is_kept(kind):
    inputs = head()
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs)
    assert torch.equal(attend(kind(0.2, 2, 16), 2, *inputs), dense)
    assert (attend(kind(0.2, 2, 16), 3, *inputs) - dense).abs().max() > 1e-2
    assert (attend(kind(1.0, 2, 16), 3, *inputs) - dense).abs().max() < 1e-5


def test_a_window_keeps_the_nearest_tiles_and_all_text():
    mask = baselines.Window(0.2, 0, 16).tiles(*head(), Site("0", 1, "0", TEXT, GRID)).dense()[0, 0]
    assert torch.equal(mask[:4, :4], torch.eye(4, dtype=torch.bool))
    assert mask[4].all() and mask[:, 4].all()


def test_minference_finds_a_column():
    query, key, value = head()
    key[:, :, 20] = 3 * query[:, :, 48:64].mean(2)  # what the last video queries look for
    key[:, :, 20] *= 8 / key[:, :, 20].norm(dim=-1, keepdim=True).clamp_min(1e-6) * 4
    policy = baselines.MInference(0.3, 0, 16)
    weights = (query[:, :, :64] @ key.mT / 4).softmax(-1)
    assert weights[..., 20].mean() > 0.1
    mask = policy.tiles(query, key, value, Site("0", 1, "0", TEXT, GRID)).dense()
    assert mask[0, :, :, 1].float().mean() > 0.7


def test_sparse_videogen_tells_temporal_heads_from_spatial_ones():
    """Head 0 looks at its frame, head 1 at its place in all frames."""
    frames, side = 8, 4
    grid, length = (frames, side, side), frames * side * side
    frame, place = torch.arange(length) // side**2, torch.arange(length) % side**2
    codes = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    features = torch.stack([codes[0][frame], codes[1][place]])[None]
    value = torch.randn(1, 2, length, 32, generator=torch.Generator().manual_seed(1))
    policy = baselines.SparseVideoGen(0.25, 0, 16)
    site, meter = Site("0", 1, "0", range(0), grid), Meter()
    meter.enter(site, 1)
    out = policy.attend(3 * features, features, value, site, meter)
    dense = torch.nn.functional.scaled_dot_product_attention(3 * features, features, value)
    window = baselines.Window(0.25, 0, 16)
    other = window.attend(3 * features, features, value, site, meter)
    error, worse = ((x - dense).square().mean((0, 2, 3)) / dense.square().mean((0, 2, 3)) for x in (out, other))
    assert (error < 0.02).all(), error  # both kinds are served
    assert worse[1] > 0.2  # which one order of the tokens alone is not


def test_fixed_tiles_are_used_as_they_are():
    mask = attention.BlockMask.of(torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.6)
    inputs = head()
    out = attend(baselines.Fixed(0.2, 0, 16, found={"a": mask}), 1, *inputs, layer="a")
    assert torch.equal(out, attention.block_sparse_attention(*inputs, mask, block_size=16))


# ---- patterns


def test_families_on_matrices_whose_best_pattern_is_plain():
    """A key that all queries want, and a neighbour that each wants, at a budget that holds just these."""
    length = 32
    eye = 12 * torch.eye(length)
    column = torch.zeros(length, length)
    column[:, 5] = 12
    found = patterns.best_recalls(
        torch.stack([torch.eye(length), torch.eye(length)])[None] * math.sqrt(length),
        torch.stack([eye, column.T])[None],
        [1 / length + 1e-6],
        [1],
    )
    density = f"{1 / length + 1e-6:g}"
    assert found[f"diagonals/{density}"][0] > 0.99 and found[f"columns/{density}"][0] < 0.05
    assert found[f"columns/{density}"][1] > 0.99 and found[f"diagonals/{density}"][1] < 0.2
    assert (found[f"tiles1/{density}"] > 0.99).all()


def test_drift_of_the_lse_is_told_apart_from_a_shift():
    before = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    shifted = patterns.lse_drift(before, before + 2, 16)
    assert torch.allclose(shifted["within"], torch.zeros(3), atol=1e-6)
    assert torch.allclose(shifted["correlation"], torch.ones(3), atol=1e-5)
    by_block = before + torch.arange(4).repeat_interleave(16)
    assert torch.allclose(patterns.lse_drift(before, by_block, 16)["within"], torch.zeros(3), atol=1e-6)
    assert (patterns.lse_drift(before, -before, 16)["correlation"] < -0.99).all()


def test_looking_on_changes_nothing(smoke):
    params = dataclasses.replace(smoke, steps=4, look_at=[2, 1, 4], families_at=[2])
    state = network.build(params).state_dict()
    found = experiment.study(params, 0, 0, state)
    assert list(found["looks"]) == [1, 2, 4]
    layers = 2 * params.heads
    tokens = params.frames * (params.side // params.patch) ** 2 + data.TEXT
    assert found["looks"][4].lse.shape == (layers, tokens)
    assert torch.equal(found["looks"][2].scores, found["looks"][1].scores) is False
    assert torch.allclose(found["looks"][2].stale, found["looks"][2].scores, rtol=1e-3, atol=1e-5)
    assert all(len(values) == layers for values in found["families"][2].values())
    dense = experiment.generate(params, "dense", 0, state)["videos"]
    assert torch.equal(dense, experiment.generate(params, "dense", 0, state)["videos"])


# ---- videos


def test_sprites_are_where_their_caption_says():
    hits = [
        hit for number in range(60) for video, words in [data.sprites(8, 32, 7, number)]
        for hit in quality.follows(video, words)
    ]  # fmt: skip
    assert sum(hits) / len(hits) > 0.9
    wrong = [
        hit for number in range(60) for video, _ in [data.sprites(8, 32, 7, number)]
        for hit in quality.follows(video, data.sprites(8, 32, 7, number + 1)[1])
    ]  # fmt: skip
    assert sum(wrong) / len(wrong) < 0.3


def test_a_sprite_bounces_at_the_rim_and_never_leaves():
    sprite = data.Sprite("red", "disc", "right", 0.15, (0.9, 0.5))
    video = data.render([sprite], torch.full((32, 32), -1.0), 40)
    red = (video[0] > 0).float()
    center = (red.sum(1) * torch.arange(32)).sum(-1) / red.sum((-2, -1))
    assert center.max() < 32 - 0.15 * 32 + 1 and center.min() > 0.15 * 32 - 2
    assert ((center[1:] - center[:-1]) > 0.5).any() and ((center[1:] - center[:-1]) < -0.5).any()
    assert red.sum((-2, -1)).min() > 0.9 * red.sum((-2, -1)).max()


def test_captions_are_embedded_with_what_belongs_together():
    text, present = data.embed([(("red", "disc", "left"), ("blue", "square", "up")), (("cockatoo",),)])
    assert text.shape == (2, data.TEXT, data.WIDTH) and present.sum(1).tolist() == [6, 1]
    swapped, _ = data.embed([(("blue", "disc", "left"), ("red", "square", "up"))])
    assert not torch.allclose(text[0, 1], swapped[0, 1])  # the disc knows its colour
    assert not text[0, 6:].any()


def test_fidelity_of_noise_is_its_size():
    video, _ = data.sprites(8, 32, 0, 0)
    inner = video * 0.5
    found = quality.fidelity(inner + 0.02 * torch.randn(inner.shape, generator=torch.Generator().manual_seed(0)), inner)
    assert found["psnr"] == pytest.approx(20 * math.log10(2 / 0.02), abs=0.2)
    assert quality.flicker(inner[:, :1].expand(3, 8, 32, 32)) == 1.0


# ---- cost


def test_a_generation_that_skips_nothing_gains_nothing():
    costs = {"sparse": 1.0, "search": 1.0, "scores": 0.0}
    assert cost.speedup(0.8, costs, (10, 30)) == pytest.approx(1.0)
    assert cost.search_share(0.8, costs, (10, 30)) == 0
    free = {"sparse": 0.0, "search": 1.0, "scores": 0.0}
    assert cost.speedup(1.0, free, (10,)) == pytest.approx(5.0)  # ten of fifty are dense
    assert cost.speedup(1.0, free, (10, 30), cached=False) == pytest.approx(50 / 11)


def test_the_longest_grid_is_hunyuanvideos():
    assert cost.grid_of(33 * 45 * 80) == (33, 45, 80)
    for tokens in (500, 4096, 30_000):
        frames, rows, columns = cost.grid_of(tokens)
        assert 0.8 * tokens < frames * rows * columns <= tokens


def test_measured_costs_hold_together():
    found = cost.measure(512, head_dim=32, keep_ratios=[0.25], block=16, rounds=2)
    assert set(found["seconds"]) == {"dense", "search", "scores", "sparse/0.25"}
    assert all(len(values) == 2 for values in found["seconds"].values())
    assert 0.25 <= found["density"]["0.25"] < 0.6 and 0.25 < found["found"]["0.25"] < 1
    rows = cost.ratios({"dense": [2.0, 4.0], "search": [3.0, 5.0]})
    assert rows == [{"search": 1.5}, {"search": 1.25}]


def test_planted_heads_have_their_pattern_and_bad_ones_are_refused():
    heads = planted.planted((8, 16, 16), 64, head_dim=32, seed=0, kinds=("columns", "diagonals"))
    weights = (heads.query @ heads.key.mT / math.sqrt(32)).softmax(-1)
    sinks = torch.zeros(weights.shape[-1], dtype=torch.bool)
    sinks[heads.text.start :] = True
    assert weights[0, 0][:, sinks].sum(-1).mean() > 0.8
    frame = torch.arange(8 * 256) // 256
    same = weights[0, 1, :2048, :2048] * (frame[:, None] == frame)
    assert same.sum() / weights[0, 1, :2048].sum() > 0.3
    with pytest.raises(ValueError, match="expected kinds among"):
        planted.planted((2, 2, 2), 4, head_dim=32, kinds=("rings",), seed=0)
    with pytest.raises(ValueError, match="multiples of 8"):
        planted.planted((2, 2, 2), 4, head_dim=20, seed=0)


# ---- arms


def test_each_arm_is_what_its_name_says(smoke):
    changed = {
        "no_tiers": ("head_adaptive", False),
        "no_cache": ("refresh_lse", "search"),
        "search_10": ("search_steps", (10,)),
        "search_10_20_30_40": ("search_steps", (10, 20, 30, 40)),
        "warmup_0": ("search_steps", (1, 8)),
        "warmup_5": ("search_steps", (5, 8)),
        "keep_0.1": ("keep_ratio", 0.1),
        "block_64": ("block_size", 64),
        "global_rule": ("rule", "global"),
        "no_sink": ("text_sink", False),
        "sink_counts": ("text_counts", True),
    }
    plain = experiment.policy(smoke, "adaspa")
    for arm, (field, value) in changed.items():
        assert getattr(experiment.policy(smoke, arm), field) == value != getattr(plain, field)
    assert experiment.policy(smoke, "dense") is None and set(changed) < set(experiment.ARMS)


def test_a_generation_leaves_the_dense_one_when_it_becomes_sparse(smoke):
    params = dataclasses.replace(smoke, steps=10, search_steps=[5, 8])
    state = network.build(params).state_dict()
    dense, ours, exact = (experiment.generate(params, arm, 0, state) for arm in ("dense", "adaspa", "kernel"))
    assert len(dense["trajectory"]) == 2
    assert torch.equal(dense["trajectory"][0], ours["trajectory"][0])
    assert not torch.equal(dense["trajectory"][1], ours["trajectory"][1])
    assert (exact["videos"] - dense["videos"]).abs().max() < 1e-3
    layers = params.double + params.single
    assert ours["calls"] == {"dense": 4 * layers, "search": 2 * layers, "selection": 2 * layers, "sparse": 5 * layers}
    _, ax = plt.subplots()
    line = figures.trajectories(ax, {"adaspa": [ours["trajectory"]]}, [dense["trajectory"]]).lines[0].get_ydata()
    plt.close("all")
    assert line[0] == pytest.approx(1e-7) and line[1] > 1e-5  # 1e-7 stands for none
