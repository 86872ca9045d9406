"""kernels.splat as torch operations: compilation, strides, dtypes, backends, light imports, and errors that help."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import splat_oracle
import torch
from splat_compare import random
from torch import Tensor

from kernels import KernelUnavailable, splat
from kernels.splat import ops, rasterization, reference

F32, F64 = torch.float32, torch.float64


def scene_and_colors(channels: int = 3) -> dict[str, Any]:
    """The arguments of `rasterization`."""
    scene = splat_oracle.scene(1, 20, 2).to(F32)
    return vars(scene) | {"colors": random(20, channels).float()}


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads it
def test_opcheck() -> None:
    scene = splat_oracle.scene(2, 6, 1, 20, 18).to(F32)
    means, quats, scales, opacities, viewmats, Ks, width, height = scene.arguments()
    limits = [0.01, 1e10, 0.0, 0.3]

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_()

    shape = (leaf(quats), leaf(scales), None)
    project = (leaf(means), *shape, opacities, leaf(viewmats), Ks, width, height, limits, True)
    # torch's check of traced gradients cannot add up outputs of which the first is whole numbers, here the radii
    most = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops._project, project, test_utils=most)
    covars = (None, None, leaf(reference._covariances(quats, scales)))
    by_covars = (leaf(means), *covars, None, leaf(viewmats), Ks, width, height, limits, False)
    torch.library.opcheck(ops._project, by_covars, test_utils=most)
    masks = torch.tensor([[True, False, True]])
    torch.library.opcheck(ops._harmonics, (2, leaf(random(1, 3, 3).float()), leaf(random(3, 9, 3).float()), masks))
    items = splat_oracle.items(scene, random(6, 4).float())
    place = (items["means2d"], items["radii"], items["depths"], items["first"], width, height)
    torch.library.opcheck(ops._bin, place)
    boxes, ids, _, offsets = ops._bin(*place)
    values = [leaf(items[name]) for name in ("means2d", "conics", "colors", "opacities")]
    background = leaf(random(1, 4).float())
    torch.library.opcheck(ops._rasterize, (*values, background, boxes, ids, offsets, width, height, 0.999, False))


@pytest.mark.parametrize("stage", ["projection", "spherical_harmonics", "rasterize"])
def test_each_stage_compiles_into_one_graph(stage: str) -> None:
    arguments = scene_and_colors()
    scene = splat_oracle.scene(1, 20, 2).to(F32)
    items = splat_oracle.items(scene, arguments.pop("colors"))
    size = {"width": scene.width, "height": scene.height}
    functions: dict[str, tuple[Callable, dict[str, Tensor]]] = {
        "projection": (lambda **kw: splat.projection(**kw, **size)[1:], tensors(vars(scene))),
        "spherical_harmonics": (
            lambda dirs, coeffs: [splat.spherical_harmonics(2, dirs, coeffs)],
            {"dirs": random(2, 20, 3).float(), "coeffs": random(20, 9, 3).float()},
        ),
        "rasterize": (lambda **kw: splat.rasterize(**kw, backgrounds=None, **size)[:2], items),
    }
    function, inputs = functions[stage]

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        return sum((2 * out).square().sum() for out in function(**inputs))  # type: ignore[return-value]

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (loss, compiled):
        leaves = {n: t.clone().requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
        value = call(leaves)
        value.backward()
        grads.append({"value": value} | {n: t.grad for n, t in leaves.items() if t.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 1
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, msg=name)


def test_strides_do_not_matter() -> None:
    arguments = scene_and_colors()
    expected = rasterization(**arguments)[0]

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.stack([tensor, tensor + 1], -1)
        return wide[..., 0] if tensor.ndim == 1 else wide[..., 0].mT.contiguous().mT

    others = {name: strided(value) for name, value in tensors(arguments).items()}
    assert not any(value.is_contiguous() for name, value in others.items() if value.ndim > 1)
    assert torch.equal(rasterization(**(arguments | others))[0], expected)


def test_gradients_that_are_not_contiguous_or_not_there() -> None:
    arguments = scene_and_colors()
    found = []
    for loss in (
        lambda render, _: render.sum(),  # what arrives is one number, expanded, and nothing for alphas
        lambda render, alphas: (render * torch.ones_like(render)).sum() + 0 * alphas.sum(),
        lambda render, alphas: (render.mT.contiguous().mT * torch.ones_like(render)).sum() + 0 * alphas.sum(),
    ):
        means = arguments["means"].clone().requires_grad_()
        render, alphas, _ = rasterization(**(arguments | {"means": means}))
        found.append(torch.autograd.grad(loss(render, alphas), means)[0])
    assert found[0].any() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    means = arguments["means"].clone().requires_grad_()
    _, alphas, _ = rasterization(**(arguments | {"means": means}))
    assert torch.autograd.grad(alphas.sum(), means)[0].any()


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_no_second_derivatives_rather_than_wrong_ones() -> None:
    arguments = scene_and_colors()
    means = arguments["means"].clone().requires_grad_()
    render, *_ = rasterization(**(arguments | {"means": means}))
    (gradient,) = torch.autograd.grad(render.square().sum(), means, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(gradient.square().sum(), means)


def test_float64_goes_through_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = scene_and_colors()
    double = arguments | {name: value.double() for name, value in tensors(arguments).items()}
    render, alphas, _ = rasterization(**double)
    assert render.dtype == alphas.dtype == F64
    monkeypatch.setenv("KERNELS_BACKEND", "cpu")
    with pytest.raises(KernelUnavailable, match=r"KERNELS_BACKEND=cpu got torch.float64 on 'cpu'; expected a float32"):
        rasterization(**double)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    arguments = scene_and_colors()
    everything = {name: value.to(dtype) for name, value in tensors(arguments).items()}
    with pytest.raises(TypeError, match=r"got dtype torch\.\w+; expected torch.float32 or torch.float64"):
        rasterization(**(arguments | everything))
    for name, value in tensors(arguments).items():
        if name != "means":
            with pytest.raises(TypeError, match=r"expected torch.float32"):
                rasterization(**(arguments | {name: value.to(dtype)}))


SHAPES = [(name, "wrong last") for name in ("quats", "scales", "viewmats", "Ks", "backgrounds", "covars")]
SHAPES += [(name, how) for name in ("opacities", "colors", *dict(SHAPES)) for how in ("one less", "one dimension more")]


@pytest.mark.parametrize(("name", "how"), SHAPES)
def test_wrong_shapes_are_named(name: str, how: str) -> None:
    arguments = scene_and_colors() | {"backgrounds": torch.zeros(2, 3)}
    if name == "covars":
        arguments |= {"quats": None, "scales": None, "covars": torch.eye(3).repeat(20, 1, 1)}
    value = arguments[name]
    wrong = {"one less": value[:-1], "one dimension more": value[None, None], "wrong last": value[..., :-1]}[how]
    with pytest.raises(ValueError, match=r"kernels\.splat\.\w+: got .*; expected "):
        rasterization(**(arguments | {name: wrong}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sh_degree": 4, "colors": torch.zeros(20, 25, 3)}, "degree 4; expected 0, 1, 2 or 3"),
        ({"sh_degree": 2, "colors": torch.zeros(20, 4, 3)}, "4 coefficients; expected 9"),
        ({"sh_degree": 0}, r"got colors \(20, 3\) .*expected \[..., N, K, 3\]"),
        ({"render_mode": "depth"}, "render_mode='depth'; expected one of RGB, D, ED, RGB.D, RGB.ED"),
        ({"rasterize_mode": "blurred"}, "rasterize_mode='blurred'; expected one of classic, antialiased"),
        ({"camera_model": "fisheye"}, "camera_model='fisheye'; expected one of pinhole"),
        ({"tile_size": 8}, "tile_size 8; expected 16"),
        ({"alpha_max": 1.0}, "alpha_max 1.0; expected a number between 0 and 1"),
        ({"sparse_grad": True}, "sparse_grad=True"),
        ({"distributed": True}, "distributed=True"),
        ({"with_ut": True}, "with_ut=True"),
        ({"radial_coeffs": torch.zeros(2, 4)}, "radial_coeffs"),
        ({"width": 0}, "image of 0 x 21; expected 1 to"),
        ({"height": -3}, "image of 37 x -3; expected 1 to"),
        ({"quats": None}, "both or neither"),
        ({"covars": torch.zeros(20, 3, 3)}, "both or neither"),
    ],
)
def test_unsupported_options_say_so(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rasterization(**(scene_and_colors() | options))


def test_a_wrong_type_is_named() -> None:
    with pytest.raises(TypeError, match="got ndarray; expected a tensor"):
        rasterization(**(scene_and_colors() | {"opacities": torch.zeros(20).numpy()}))
    with pytest.raises((TypeError, ValueError), match="widht"):
        rasterization(**scene_and_colors(), widht=3)


def test_too_many_tiles_are_refused_before_the_memory_is_taken() -> None:
    # a million wide Gaussians on 2^12 x 2^12 tiles each: 10^13 pairs
    count, ones = 10**6, torch.ones(10**6)
    items = (torch.full((count, 2), 2.0**15), torch.tensor([[1e-9, 0, 1e-9]]).expand(count, 3), ones[:, None], ones)
    radii = torch.full((count, 2), 2**16, dtype=torch.int32)
    with pytest.raises(MemoryError, match=r"1000000 Gaussians touch [\d,]+ tiles .* make the Gaussians smaller"):
        splat.rasterize(*items, radii, ones, torch.tensor([0, count]), None, 2**16, 2**16)


def test_relocation_and_noise_are_the_reference_s() -> None:
    scene, noise = splat_oracle.scene(3, 30).to(F32), random(30, 3).float()
    ratios = torch.arange(30)
    found = splat.relocation(scene.opacities, scene.scales, ratios)
    for ours, theirs in zip(found, reference.relocation(scene.opacities, scene.scales, ratios), strict=True):
        assert torch.equal(ours, theirs)
    shape = (scene.quats, scene.scales, scene.opacities)
    assert torch.equal(splat.position_noise(*shape, noise), reference.position_noise(*shape, noise))
    with pytest.raises(ValueError, match=r"got ratios \(29,\)"):
        splat.relocation(scene.opacities, scene.scales, ratios[:-1])
    with pytest.raises(ValueError, match=r"expected \[n\] int"):
        splat.relocation(scene.opacities, scene.scales, ratios.float())
    with pytest.raises(ValueError, match=r"got noise of shape \(3, 30\); expected noise \[N, 3\]"):
        splat.position_noise(*shape, noise.mT)


SMALL = """
import sys, torch
from kernels.splat import rasterization
means, ones = torch.tensor([[0.0, 0, 2]], requires_grad=True), torch.ones(1, 4)
colors, views, Ks = torch.ones(1, 1, 3), torch.eye(4)[None], torch.eye(3)[None]
render, *_ = rasterization(means, ones, ones[:, :3], ones[:, 0], colors, views, Ks, 4, 4, sh_degree=0)
render.square().sum().backward()
assert means.grad.any()
"""


def run_alone(code: str) -> subprocess.CompletedProcess:
    # in a process of its own, because this one has loaded everything already
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_without_a_binary_nothing_is_silently_slow(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_NATIVE", str(tmp_path))
    monkeypatch.delenv("KERNELS_BACKEND", raising=False)
    first_asked_then_not = f"import os; os.environ['KERNELS_BACKEND'] = 'reference'\n{SMALL}"
    first_asked_then_not += f"print('drawn'); del os.environ['KERNELS_BACKEND']\n{SMALL}"
    result = run_alone(first_asked_then_not)
    assert result.stdout == "drawn\n" and result.returncode != 0, result.stderr
    assert "KernelUnavailable" in result.stderr
    assert "make kernels" in result.stderr and "KERNELS_BACKEND=reference" in result.stderr


def test_the_first_image_does_not_import_the_compiler() -> None:
    # torch._dynamo and sympy take seconds, which every notebook would pay
    result = run_alone(SMALL + "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)")
    assert result.returncode == 0, result.stderr
