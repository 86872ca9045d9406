"""Reaches the self-attention of diffusers' video transformers, and leaves them as they were.

class          tokens of an attention          how it is reached
HunyuanVideo   video, then padded text; masked  the dispatcher
CogVideoX      text, then video                 its processors, which call torch directly
Wan, LTX       video (cross-attention is left)  the dispatcher
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.attention import dispatcher
from common.attention.intercept import Intercept
from common.attention.policy import Policy
from common.attention.run import Run

__all__ = ["known_transformers", "video_attention"]

Grid = tuple[int, int, int]


@contextmanager
def video_attention(model: Any, policy: Policy) -> Iterator[Run]:
    """Inside the block the self-attention of a diffusers pipeline or transformer is computed by the policy.

    Steps are counted from 1, by the timesteps the transformer is called with. Several generations in one block are told
    apart by timesteps that turn back; the policy forgets the one before. Afterwards the model is as before, whatever
    happened; what was measured stays in the `Run`.

    Args:
        model: a pipeline with a `transformer` (and a `transformer_2`: Wan 2.2), or a transformer; see
            `known_transformers`.

    Raises:
        TypeError: for a model without a transformer known here.
        ImportError: for a diffusers whose dispatcher is not known to take our attention.
        RuntimeError: for a transformer that is in another such block, or whose attention was replaced by others.
        AttentionNotReached: at the end, if nothing was replaced.
    """
    found = _transformers(model)
    run = Run(policy)
    with ExitStack() as undo:
        for name, transformer in found.items():
            _Reached(name, transformer, run).install(undo)
        undo.callback(run.stop)
        yield run
    run.close()


def known_transformers() -> list[str]:
    """Names of the classes whose attention can be replaced."""
    return sorted(_KNOWN)


@dataclass(frozen=True)
class _Kind:
    """What must be known of a class. `layers`: patterns of its self-attention modules; `text`: where text stands in
    their sequence; `grid`: (configuration, arguments of a forward pass) -> frames, rows, columns of tokens."""

    layers: tuple[str, ...]
    text: Literal["first", "last", "none"]
    dispatched: bool
    grid: Callable[[Mapping[str, Any], Mapping[str, Any]], Grid]


class _Reached:
    """A transformer whose attention goes to a run.

    What a backend is not told (layer, length of the text, CFG pass, grid) is noted by hooks before it is called.
    """

    def __init__(self, name: str, transformer: nn.Module, run: Run) -> None:
        self.name, self.transformer, self.run, self.kind = name, transformer, run, _kind(transformer)
        self.layers = {
            path: module
            for path, module in transformer.named_modules()
            if any(fnmatchcase(path, pattern) for pattern in self.kind.layers)
        }
        self.layer, self.text = "", 0
        self.cfg: str | None = None
        self.grid: Grid | None = None

    def install(self, undo: ExitStack) -> None:
        """Put everything in its place; `undo` takes it away."""
        if IN_USE in self.transformer.__dict__:
            raise RuntimeError(f"{self._title()}: its attention is replaced already; leave the other with block first")
        setattr(self.transformer, IN_USE, True)
        undo.callback(delattr, self.transformer, IN_USE)
        if self.kind.dispatched:
            dispatcher.install(self.layers, self.attend, undo)
        else:
            for path, layer in self.layers.items():
                self._wrap_processor(path, layer, undo)
        self._note_passes(undo)
        hooks = [
            self.transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.transformer.register_forward_hook(self._after_forward),
        ]
        for path, layer in self.layers.items():
            hooks.append(layer.register_forward_pre_hook(self._layer_hook(path), with_kwargs=True))
        for hook in hooks:
            undo.callback(hook.remove)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """An attention of the layer last noted; [B, H, L, D]."""
        text = range(self.text)
        if self.kind.text == "last":
            text = range(query.shape[2] - self.text, query.shape[2])
        return self.run.attend(query, key, value, layer=self.layer, text=text, grid=self.grid, **options)

    def _wrap_processor(self, path: str, layer: Any, undo: ExitStack) -> None:
        original = layer.processor
        layer.set_processor(_Processor(original, self.attend, path))
        undo.callback(layer.set_processor, original)

    def _note_passes(self, undo: ExitStack) -> None:
        """Pipelines name their CFG passes for diffusers' caches: listen in."""
        original: Any = getattr(self.transformer, "cache_context", None)
        if original is None:
            return

        @contextmanager
        def cache_context(name: str, **about: Any) -> Iterator[None]:
            self.cfg = name
            try:
                with original(name, **about):
                    yield
            finally:
                self.cfg = None

        self.transformer.cache_context = cache_context  # type: ignore[assignment]
        undo.callback(delattr, self.transformer, "cache_context")

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments = _arguments(module, args, kwargs)
        self.grid = self.kind.grid(module.config, arguments)  # type: ignore[arg-type]
        # tokens may have timesteps of their own, 0 where an image is given: the largest is that of the step
        timestep = float(torch.as_tensor(arguments["timestep"]).max())
        self.run.begin(timestep, self.cfg)

    def _after_forward(self, *_: Any) -> None:
        self.run.end()

    def _layer_hook(self, path: str) -> Callable[..., None]:
        layer = f"{self.name}.{path}" if self.name else path

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            text = _arguments(module, args, kwargs).get("encoder_hidden_states")
            self.layer, self.text = layer, 0 if text is None else text.shape[1]

        return note

    def _title(self) -> str:
        return f"{type(self.transformer).__name__} {self.name!r}"


class _Processor:
    """CogVideoX's own processor with its attention caught: projections, norms and rotations stay the model's."""

    def __init__(self, original: Any, attend: Callable[..., Tensor], layer: str) -> None:
        self.original, self._attend, self._layer = original, attend, layer

    # spelled out: diffusers drops arguments that a processor's signature does not name
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        with Intercept(self._attend) as caught:
            out = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if caught.calls != 1:
            raise RuntimeError(
                f"attention at {self._layer!r}: its processor {type(self.original).__name__} called torch's attention "
                f"{caught.calls} times; expected once, as CogVideoXAttnProcessor2_0 does"
            )
        return out


IN_USE = "_resparse_attention"


def _transformers(model: Any) -> dict[str, nn.Module]:
    """By name: those of a pipeline, or the model itself under an empty name."""
    if isinstance(model, nn.Module):
        _kind(model)
        return {"": model}
    named = {name: getattr(model, name, None) for name in ("transformer", "transformer_2")}
    found = {name: part for name, part in named.items() if isinstance(part, nn.Module)}
    if not found:
        raise TypeError(
            f"got {type(model).__name__}; expected a diffusers pipeline with a transformer, or a transformer: "
            f"{', '.join(known_transformers())}"
        )
    for part in found.values():
        _kind(part)
    return found


def _kind(transformer: nn.Module) -> _Kind:
    for base in type(transformer).__mro__:
        if base.__name__ in _KNOWN:
            return _KNOWN[base.__name__]
    raise TypeError(
        f"got a transformer of class {type(transformer).__name__}, whose order of tokens is not known here; expected "
        f"one of {', '.join(known_transformers())}"
    )


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a call, by name. The class is asked: offloading replaces the forward of an instance."""
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments


def _hunyuan(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> Grid:
    side, time = config["patch_size"], config["patch_size_t"]
    return _patches(arguments["hidden_states"].shape[2:], (time, side, side))


def _cogvideox(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> Grid:
    frames, _, rows, columns = arguments["hidden_states"].shape[1:]
    side = config["patch_size"]
    return _patches((frames, rows, columns), (config["patch_size_t"] or 1, side, side))


def _wan(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> Grid:
    return _patches(arguments["hidden_states"].shape[2:], config["patch_size"])


def _ltx(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> Grid:
    frames, rows, columns = (arguments.get(name) or 1 for name in ("num_frames", "height", "width"))
    return frames, rows, columns


def _patches(size: tuple[int, ...], patch: tuple[int, ...]) -> Grid:
    frames, rows, columns = (-(-length // step) for length, step in zip(size, patch, strict=True))
    return frames, rows, columns


_KNOWN = {
    "HunyuanVideoTransformer3DModel": _Kind(
        ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"), "last", True, _hunyuan
    ),
    "CogVideoXTransformer3DModel": _Kind(("transformer_blocks.*.attn1",), "first", False, _cogvideox),
    "WanTransformer3DModel": _Kind(("blocks.*.attn1",), "none", True, _wan),
    "LTXVideoTransformer3DModel": _Kind(("transformer_blocks.*.attn1",), "none", True, _ltx),
}
