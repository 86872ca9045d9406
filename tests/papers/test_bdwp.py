"""BDWP's method: the equations by hand, the two views, costs, counted work, released tiles; and the published sets."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from PIL import Image
from torch import nn

from common import params as parameters
from common.data import images
from common.data.images import ImageSet
from kernels import nm
from papers.bdwp import data, experiment, fidelity, method, networks, timing
from papers.bdwp.settings import Params


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**changes) -> Params:
    small = {"steps": 3, "batch": 16, "layers": ["32x8"], "timed": ["2:8"], "repeats": 2}
    return dataclasses.replace(parameters.load(Params, "bdwp", "smoke"), **(small | changes))


@pytest.fixture
def halves(monkeypatch) -> data.InMemory:
    """Noise with a bright half, which of the two being the class."""
    labels = torch.arange(64) % 2
    pixels = torch.randint(100, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[:, :, :4] += (100 * labels).to(torch.uint8)[:, None, None, None]
    found = ImageSet("halves", pixels, labels, ("dark", "bright"))
    monkeypatch.setattr(images, "digits", lambda split: found)
    return data.load(tiny(), "resnet_cifar")


# ---------------------------------------------------------------------------------------------------------- equations


def test_each_view_is_grouped_along_the_axis_that_its_product_sums_over():
    weight = torch.tensor([[3.0, -4.0], [1.0, 2.0]])
    seen = method.views(weight, 1, 2)
    assert seen.forward.tolist() == [[0, -4], [0, 2]], "of each row the larger one"
    assert seen.backward.tolist() == [[3, -4], [0, 0]], "of each column the larger one"


def test_the_passes_use_their_own_view():
    seen, x, dy = method.views(normal(8, 16), 2, 8), normal(3, 16, seed=1), normal(3, 8, seed=2)
    torch.testing.assert_close(method.forward(x, seen), x @ (seen.weight * nm.mask(seen.weight, 2, 8, dim=1)).T)
    torch.testing.assert_close(method.input_gradient(dy, seen), dy @ (seen.weight * nm.mask(seen.weight, 2, 8, dim=0)))
    exact = dy @ seen.forward
    assert (method.input_gradient(dy, seen) - exact).abs().max() > 0.1, "not the gradient of the forward pass"
    assert method.weight_gradient(dy, x).count_nonzero() == 8 * 16, "dense"


def test_the_pull_works_on_what_the_forward_view_leaves_out():
    seen, gradient = method.views(normal(8, 8), 2, 8), normal(8, 8, seed=1)
    after = method.update(seen, gradient, rate=0.1, decay=0.5)
    plain = seen.weight - 0.1 * gradient
    assert torch.equal(after[seen.kept], plain[seen.kept])
    torch.testing.assert_close(after[~seen.kept], plain[~seen.kept] - 0.05 * seen.weight[~seen.kept])


def test_the_dense_limit_is_ordinary_training():
    """With n = m one step is that of autograd."""
    first, second = normal(8, 8).requires_grad_(), normal(8, 8, seed=1).requires_grad_()
    x, y = normal(4, 8, seed=2), normal(4, 8, seed=3)
    (0.5 * ((x @ first.T).relu() @ second.T - y).square().sum() / 4).backward()
    found = method.fit_perceptron(first.detach(), second.detach(), [(x, y)], 8, 8, rate=0.1, decay=1.0)
    for weight, after in zip((first, second), found, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(after, weight.detach() - 0.1 * weight.grad)


@pytest.mark.parametrize(("recipe", "same"), [("bdwp", True), ("sr_ste", False), ("bdwp_ste", False)])
def test_layers_give_the_weights_of_the_equations(recipe, same):
    difference = (experiment.ten_steps(recipe, 0.3) - experiment.ten_steps_written_out(0.3)).abs().max()
    assert difference < 1e-12 if same else difference > 1e-3


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="expected one of dense, sr_ste"):
        method.recipe("sdgp", 0.0)
    with pytest.raises(ValueError, match="expected one of"):
        method.cost("sdgp", 2, 8)


# --------------------------------------------------------------------------------------------------------------- cost


def test_costs_are_those_of_the_closed_form():
    for n, m, one, two in ((2, 4, 5 / 6, 2 / 3), (2, 8, 0.75, 0.5), (1, 16, 0.6875, 0.375)):
        assert method.cost("dense", n, m) == 1
        assert method.cost("sr_ste", n, m) == pytest.approx(one)
        for name in ("bdwp", "bi_mask", "transposable"):
            assert method.cost(name, n, m) == pytest.approx(two)


def test_counts_of_resnet_9_by_hand(halves):
    """On one image of 32 x 32; the stem has no input gradient, stem and head stay dense."""
    found = experiment.count(tiny(counted=["2:8"]), "resnet9", halves)["bdwp/2:8"]
    sizes = [(3, 64, 32), (64, 128, 32), (128, 128, 16), (128, 128, 16), (128, 256, 16)]
    sizes += [(256, 512, 8), (512, 512, 4), (512, 512, 4)]
    stem, *middle = (9 * a * b * side**2 for a, b, side in sizes)
    head = 512 * 10
    assert found.whole_dense.total == 2 * stem + 3 * sum(middle) + 3 * head
    assert found.layers_dense.total == 3 * sum(middle)
    assert found.layers_share == 0.5
    assert found.whole.total == 2 * stem + 1.5 * sum(middle) + 3 * head


# ---------------------------------------------------------------------------------------------------- relatives, tiles


def test_illegal_groups_are_counted_along_an_axis():
    kept = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    assert method.illegal_groups(kept, 1, 2, dim=1) == 0.25
    assert method.illegal_groups(kept, 1, 2, dim=0) == 0.25
    assert method.illegal_groups(kept, 2, 2, dim=0) == 0


def test_released_tiles_are_legal_along_the_inputs_alone():
    kept = method.released_transposable(normal(64, 64), 2, 4)
    assert kept.float().mean() == 0.5
    assert method.illegal_groups(kept, 2, 4, dim=1) == 0
    assert method.illegal_groups(kept, 2, 4, dim=0) == pytest.approx(5 / 16, abs=0.05)  # as chance has it


def test_the_backward_view_keeps_most_of_what_is_legal():
    weight = normal(64, 64)
    best = method.views(weight, 2, 8).backward.square().sum()
    transposable = (weight * nm.mask(weight, 2, 8, transposable=True)).square().sum()
    assert best > 1.02 * transposable


# --------------------------------------------------------------------------------------------------- arms, trainings


def test_arms_of_all_networks_are_named():
    names = experiment.arms(parameters.load(Params, "bdwp", "laptop"))
    assert list(names)[:3] == ["dense", "sr_ste/2:8", "bdwp/2:8"]
    assert names["vit/bdwp/2:8"] == experiment.Arm("vit", "bdwp", "2:8")
    assert names["resnet20/dense"] == experiment.Arm("resnet20", "dense", "2:8")
    assert len(names) == 17


def test_resnet20_is_the_published_one_whatever_the_depth_of_the_first():
    network = networks.build(tiny(), "resnet20", classes=10, channels=3, size=16)
    assert sum(weight.numel() for weight in network.parameters()) == 269_722
    assert len(networks.build(tiny(), "resnet_cifar", classes=10, channels=3, size=16).blocks) == 3


@pytest.mark.parametrize("name", ["bdwp/2:8", "bi_mask/2:8", "transposable/2:8", "sr_ste/2:8", "vit/bdwp/2:8"])
def test_a_training_ends_legal_where_it_should(halves, name):
    params = tiny()
    result = experiment.fit(params, experiment.arms(params)[name], halves, 0)
    assert result["illegal"]["forward"] == 0
    assert (result["illegal"]["backward"] > 0) == ("sr_ste" in name)
    assert len(result["loss"]) == 3 and "state" not in result


def test_gradients_are_compared_on_one_state(halves):
    params = tiny()
    state = experiment.fit(params, experiment.arms(params)["dense"], halves, 0, keep=True)["state"]
    found = fidelity.compare(params, halves, state)
    assert found["transposable"].network == pytest.approx(1)
    assert found["transposable"].own == pytest.approx(1)
    assert found["bdwp"].by_layer[-1] == pytest.approx(1), "nothing above it hands on a wrong gradient"
    assert found["bdwp"].network < 0.999
    assert found["bdwp"].energy > max(found["bi_mask"].energy, found["transposable"].energy)


def test_timed_products_are_the_products():
    runs = timing.contenders("32x8", ["2:8"])
    draw = timing.seeds.generator(0, "timing")
    weight = torch.randn(32, 32, generator=draw)
    x, dy = (torch.randn(8, 32, generator=draw) for _ in range(2))
    seen = method.views(weight, 2, 8)
    for name, expected in {
        "dense/input": dy @ weight,
        "2:8/forward": method.forward(x, seen),
        "2:8/input": method.input_gradient(dy, seen),
        "2:8/scattered": dy @ seen.forward,
    }.items():
        torch.testing.assert_close(runs[name](), expected, msg=name)
    forward, backward = timing.pre_generate(weight, 2, 8)
    assert torch.equal(forward.to_dense(), seen.forward) and torch.equal(backward.to_dense().T, seen.backward)
    found = timing.seconds("32x8", ["2:8"], 2)
    assert all(len(row) == 2 and min(row) > 0 for row in found.values())


# ----------------------------------------------------------------------------------------------------- published sets


@pytest.fixture
def published(tmp_path):
    """CIFAR-10 and CIFAR-100 as their archives unpack, and a folder of two classes for the others."""

    def batch(path, key, count):
        path.parent.mkdir(exist_ok=True)
        raw = {b"data": torch.randint(256, (count, 3072), dtype=torch.uint8).numpy(), key: list(range(count))}
        path.write_bytes(pickle.dumps(raw))

    for part in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        batch(tmp_path / "cifar-10-batches-py" / part, b"labels", 4)
    for part in ("train", "test"):
        batch(tmp_path / "cifar-100-python" / part, b"fine_labels", 6)
    for split in ("train", "val"):
        for name, colour in (("n01", (200, 30, 30)), ("n02", (30, 30, 200))):
            folder = tmp_path / "tiny-imagenet-200" / split / name / "images"
            folder.mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (64, 64), colour).save(folder / f"{index}.JPEG")
    return tmp_path


def paper(folder, **changes) -> Params:
    small = {"data_dir": str(folder), "device": "cpu", "batch": 3, "steps": 1, "loaders": 0, "vit_width": 32}
    small |= {"vit_depth": 1}
    return dataclasses.replace(parameters.load(Params, "bdwp", "paper"), **(small | changes))


@pytest.mark.parametrize(
    ("network", "name", "images_", "classes"),
    [("resnet9", "cifar10", 20, 10), ("vit", "cifar100", 6, 100), ("resnet18", "tiny_imagenet", 6, 2)],
)
def test_the_paper_profile_trains_on_the_published_layouts(published, network, name, images_, classes):
    params = paper(published)
    loaded = data.load(params, network)
    assert (loaded.name, len(loaded), loaded.classes) == (name, images_, classes)
    arm = next(arm for arm in experiment.arms(params).values() if (arm.network, arm.recipe) == (network, "bdwp"))
    result = experiment.fit(params, arm, loaded, 0)
    assert result["illegal"] == {"forward": 0, "backward": 0}
    first = [next(iter(loaded.batches(3, 1, 0)))[1].tolist() for _ in range(2)]
    assert first[0] == first[1], "a seed's order"


def test_vgg19_has_sixteen_convolutions():
    with torch.device("meta"):
        network = networks.build(tiny(), "vgg19", classes=100, channels=3, size=32)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 100)
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.modules()) == 16


def test_sets_that_cannot_serve_say_why(published):
    with pytest.raises(FileNotFoundError, match=r"cs\.toronto\.edu"):
        data.load(paper(published / "nowhere"), "resnet9")
    with pytest.raises(FileNotFoundError, match="imagenet"):
        data.load(paper(published), "resnet50")
    with pytest.raises(ValueError, match="no published set"):
        data.load(paper(published), "resnet_cifar")
    with pytest.raises(ValueError, match="needs none"):
        data.load(tiny(data_dir="somewhere"), "vit")
    (published / "tiny-imagenet-200" / "val" / "n03").mkdir()
    Image.new("RGB", (9, 9)).save(published / "tiny-imagenet-200" / "val" / "n03" / "0.JPEG")
    with pytest.raises(ValueError, match=r"2 classes in train/ and 3 in val/"):
        data.load(paper(published), "resnet18")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pattern", "8:2", "expected n:m"),
        ("arms", ["bdwp"], "expected a recipe and a pattern"),
        ("layers", ["64"], "expected channels and tokens"),
        ("networks", ["alexnet"], "expected some of"),
        ("other_arms", ["sdgp/2:8"], "other_arms has"),
    ],
)
def test_settings_that_fit_nothing_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{field: value})
