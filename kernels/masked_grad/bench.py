"""What `kernels.bench` times for masked gradients: the weight's gradient, the update, and a whole step of fine-tuning.

A gradient is held against the dense one of which the chosen entries are taken, as sparse fine-tuning does it that has
no kernel. An update of chosen entries is held against torch's index operations and against torch's fused AdamW of the
whole weight. A step is forward, backward and update of a stack of linear layers; LoRA's rank gives it as many
parameters as entries are chosen, as nearly as a whole rank can; so does SHiRA's in peft. Densities are SaRA's 5, 20 and
50 million of Stable Diffusion's 860, and two above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import info, masked_grad
from kernels.bench import CORES, Case, Contender, missing, other_isas, with_isa
from kernels.masked_grad import Moments, Selection, cpu, reference
from kernels.masked_grad.ops import Window

PEERS: tuple[str, ...] = ("peft",)
DENSITIES = (0.0058, 0.023, 0.058, 0.1, 0.2)
LINEAR = ((1280, 1280, 1024), (640, 640, 1024), (1280, 5120, 256), (320, 320, 4096))  # rows, columns, tokens
# rows, channels, side of the image, images: 3 x 3 windows
CONV2D = ((320, 320, 32, 2), (640, 640, 16, 4), (64, 64, 16, 32))
UPDATED = (4000, 5000)  # 20 million weights
STEP = (640, 8, 1024)  # width, layers, tokens


def cases(quick: bool) -> Iterator[Case]:
    """Gradients of linear layers and convolutions, updates, whole steps; with `quick` one small case of each."""
    densities = DENSITIES[1:2] if quick else DENSITIES
    for density in densities:
        for size in ((64, 64, 40),) if quick else LINEAR:
            yield _linear(*size, density)
    for density in densities:
        for size in ((16, 8, 6, 2),) if quick else CONV2D:
            yield _conv2d(*size, density)
    for density in densities:
        yield _update((60, 50) if quick else UPDATED, density)
    for density in densities[:3]:
        for threads in (1, 2)[:CORES]:
            yield _step(*((32, 2, 16) if quick else STEP), density, threads)


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _chosen(shape: Sequence[int], density: float) -> Selection:
    return Selection.from_mask(torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < density)


def _linear(rows: int, columns: int, tokens: int, density: float) -> Case:
    selection, dy, x = _chosen((rows, columns), density), _noise(tokens, rows), _noise(tokens, columns, seed=1)
    positions, index = selection.positions(), (selection.offsets, selection.starts)
    order = positions.argsort()  # of a CSR matrix
    crow = torch.zeros(rows + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(positions // columns, minlength=rows).cumsum(0)
    pattern = torch.sparse_csr_tensor(crow, positions[order] % columns, torch.zeros(len(order)), (rows, columns))
    narrow = dy.bfloat16(), x.bfloat16()
    contenders = [
        Contender("dense, then taken", lambda: (dy.mT @ x).flatten()[positions], _same, ours=True),
        *_ours(partial(cpu.linear_gradient, dy, x, *index)),
        Contender(
            "ours bfloat16", partial(cpu.linear_gradient, *narrow, *index), _same, note="inputs rounded", ours=True
        ),
        Contender(
            "sampled_addmm",
            lambda: torch.sparse.sampled_addmm(pattern, dy.mT, x, beta=0.0).values(),
            lambda values: values[order.argsort()],
            note="torch.sparse, CSR",
        ),
    ]
    return Case(
        name=f"{rows}x{columns} x {tokens}, {density:.1%}",
        call="gradient of a linear layer",
        contenders=contenders,
        baseline="dense, then taken",
        exact=lambda: (dy.double().mT @ x.double()).flatten()[positions],
        data_bytes=dy.nbytes + x.nbytes + 4 * selection.count,
    )


def _conv2d(rows: int, channels: int, side: int, images: int, density: float) -> Case:
    shape = (rows, channels, 3, 3)
    selection, dy, x = (
        _chosen(shape, density),
        _noise(images, rows, side, side),
        _noise(images, channels, side, side, seed=1),
    )
    positions, window = selection.positions(), Window((3, 3), (1, 1), (1, 1), (1, 1), 1)
    dense = partial(reference.conv2d_gradient, dy, x, positions, shape, *window[1:])
    return Case(
        name=f"{rows}x{channels}x3x3 on {images}x{side}x{side}, {density:.1%}",
        call="gradient of a convolution",
        contenders=[
            Contender("dense, then taken", dense, _same, ours=True),
            *_ours(partial(cpu.conv2d_gradient, dy, x, selection.offsets, selection.starts, window)),
        ],
        baseline="dense, then taken",
        exact=lambda: reference.conv2d_gradient(dy.double(), x.double(), positions, shape, *window[1:]),
        data_bytes=dy.nbytes + x.nbytes + 4 * selection.count,
    )


def _update(shape: tuple[int, int], density: float) -> Case:
    selection = _chosen(shape, density)
    positions, grad = selection.positions(), _noise(selection.count)
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

    def by_index() -> Callable[[], Tensor]:
        weight, state = _noise(*shape), Moments.zeros(selection)

        def run() -> Tensor:
            reference.adamw_(weight, grad, positions, state.first, state.second, lr=0.0, step=1, **settings)
            return weight

        return run

    def ours(dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
        weight, state = _noise(*shape).to(dtype), Moments.zeros(selection)

        def run() -> Tensor:
            masked_grad.adamw_(weight, grad, selection, state, lr=0.0)
            return weight

        return run

    whole = nn.Parameter(_noise(*shape))
    whole.grad = torch.zeros(shape)
    optimizer = torch.optim.AdamW([whole], lr=0.0, fused=True)
    return Case(
        name=f"{shape[0]}x{shape[1]}, {density:.1%}",
        call="AdamW",
        contenders=[
            Contender("torch index", by_index(), _same, ours=True),
            *_ours(ours()),
            Contender("ours bfloat16", ours(torch.bfloat16), _same, note="weight rounded"),
            Contender("torch fused, all", optimizer.step, note="of all weights: another result"),
        ],
        baseline="torch index",
        exact=lambda: _noise(*shape).double(),  # a learning rate of 0 leaves it, so that every call does the same
        data_bytes=4 * selection.count * 6,
    )


def _step(width: int, layers: int, tokens: int, density: float, threads: int) -> Case:
    """Steps of training towards noise; lr 0, so that every call does the same."""
    rank = max(1, round(density * width / 2))
    chosen = [_chosen((width, width), density) for _ in range(layers)]
    x, weights = _noise(tokens, width, seed=2), [_noise(width, width, seed=i) / width**0.5 for i in range(layers)]
    count = sum(selection.count for selection in chosen)
    contenders = [
        Contender("full fine-tuning", _full(x, weights), threads=threads, note=f"{layers * width**2} parameters"),
        Contender("LoRA", _lora(x, weights, rank), threads=threads, note=f"{2 * layers * width * rank} parameters"),
        Contender("ours", _masked(x, weights, chosen), threads=threads, note=f"{count} parameters", ours=True),
    ]
    if find_spec("peft") is None:
        contenders.append(missing("peft SHiRA", "peft"))
    else:
        note = f"{2 * layers * width * rank} parameters"
        contenders.append(Contender("peft SHiRA", _shira(x, weights, rank), threads=threads, note=note))
    return Case(
        name=f"{layers} layers {width}x{width} x {tokens}, {density:.1%}" + (", 2 threads" if threads == 2 else ""),
        call="step of fine-tuning",
        contenders=contenders,
        baseline="LoRA",
        exact=lambda: torch.ones(1),
        data_bytes=x.nbytes + sum(weight.nbytes for weight in weights),
    )


def _full(x: Tensor, weights: list[Tensor]) -> Callable[[], Any]:
    leaves = [nn.Parameter(weight.clone()) for weight in weights]
    return _training(lambda: _stack(x, [partial(F.linear, weight=leaf) for leaf in leaves]), leaves)


def _lora(x: Tensor, weights: list[Tensor], rank: int) -> Callable[[], Any]:
    width = x.shape[1]
    down = [nn.Parameter(_noise(rank, width, seed=i) / width**0.5) for i in range(len(weights))]
    up = [nn.Parameter(torch.zeros(width, rank)) for _ in weights]

    def layer(x: Tensor, i: int) -> Tensor:
        return F.linear(x, weights[i]) + F.linear(F.linear(x, down[i]), up[i])

    return _training(lambda: _stack(x, [partial(layer, i=i) for i in range(len(weights))]), [*down, *up])


def _shira(x: Tensor, weights: list[Tensor], rank: int) -> Callable[[], Any]:
    from peft import ShiraConfig, get_peft_model

    model = nn.Sequential()
    for weight in weights:
        model.extend([nn.Linear(*weight.shape, bias=False), nn.ReLU()])
        model[-2].weight.data.copy_(weight)  # pyright: ignore[reportArgumentType, reportCallIssue]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    tuned = get_peft_model(model, ShiraConfig(r=rank, target_modules=names))  # pyright: ignore[reportArgumentType]
    return _training(lambda: tuned(x), [leaf for leaf in tuned.parameters() if leaf.requires_grad])


def _masked(x: Tensor, weights: list[Tensor], chosen: list[Selection]) -> Callable[[], Any]:
    held = [
        (weight.clone(), masked_grad.handle(s), s, Moments.zeros(s)) for weight, s in zip(weights, chosen, strict=True)
    ]
    layers = [partial(masked_grad.linear, weight=w, values=v, selection=s) for w, v, s, _ in held]

    def run() -> Tensor:
        loss = _stack(x, layers).square().mean()
        loss.backward()
        for weight, values, selection, moments in held:
            assert values.grad is not None
            masked_grad.adamw_(weight, values.grad, selection, moments, lr=0.0)
            values.grad = None
        return loss.detach()

    return run


def _stack(x: Tensor, layers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    for layer in layers:
        x = layer(x).relu()
    return x


def _training(forward: Callable[[], Tensor], leaves: list[nn.Parameter]) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(leaves, lr=0.0, fused=True)

    def run() -> Tensor:
        loss = forward().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def _ours(run: Callable[[], Tensor]) -> list[Contender]:
    """On one thread and two, and with the other instruction sets."""
    isa = info()["isa"]
    found = [Contender(f"ours {isa}", run, _same, threads, ours=True) for threads in (1, 2)[:CORES]]
    return found + [
        Contender(f"ours {other}", partial(with_isa, other, run), _same, ours=True) for other in other_isas()
    ]


def _same(result: Tensor) -> Tensor:
    return result
