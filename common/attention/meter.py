"""What a run measured: time by phase, realised density, recall, and what sparsity can bring at most."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from common.attention.policy import Site

__all__ = ["Meter", "Recall", "Report"]


@dataclass(frozen=True)
class Recall:
    """Share of the attention weight in the chosen tiles, [B, H], at a search step of a generation (both from 1)."""

    generation: int
    step: int
    layer: str
    cfg: str
    recall: Tensor


class Meter:
    """Handed to a policy with every attention; what it notes is read through `Run.report()`.

    On CUDA the device is waited for at both ends of a phase, so that its time is its own.
    """

    def __init__(self) -> None:
        self.recalls: list[Recall] = []
        self._densities: dict[str, _Mean] = defaultdict(_Mean)
        self._forwards: list[_Forward] = []
        self._open: _Forward | None = None
        self._site: tuple[Site, int] | None = None
        self._started = _now()
        self._stopped: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside as part of the attention at hand; phases do not nest."""
        start = _now()
        yield
        if self._open is not None:
            self._open.spans.append((name, _now() - start))

    def density(self, density: Tensor) -> None:
        """Note the share of tiles [B or 1, H] that this sparse attention keeps."""
        self._densities[self._here()[0].layer].add(density)

    def recall(self, recall: Tensor) -> None:
        """Note the share of attention weight [B, H] in the tiles just chosen."""
        site, generation = self._here()
        self.recalls.append(Recall(generation, site.step, site.layer, site.cfg, recall))

    def enter(self, site: Site, generation: int) -> None:
        """An attention begins there."""
        self._site = (site, generation)

    def begin(self) -> None:
        """A forward pass of the model begins; one that never ended counts nothing."""
        self._open = _Forward(_now())

    def end(self) -> None:
        """The forward pass ended."""
        if self._open is not None:
            self._open.seconds = _now() - self._open.start
            self._forwards.append(self._open)
            self._open = None

    def stop(self) -> None:
        """The run is over."""
        self._stopped = _now()

    def report(self) -> Report:
        """All of it, so far."""
        total = (self._stopped or _now()) - self._started
        forwards = [forward.seconds for forward in self._forwards]
        spans: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        for forward in self._forwards:
            for name, seconds in forward.spans:
                spans[name] += seconds
                calls[name] += 1
        dense = [f for f in self._forwards if f.phases() == {"dense"}]
        sparse = [f for f in self._forwards if f.phases() == {"sparse"}]
        return Report(
            seconds={
                **_ordered(spans),
                "other": sum(forwards) - sum(spans.values()),
                "outside": total - sum(forwards),
            },
            calls=_ordered(calls),
            forwards=len(forwards),
            densities={layer: mean.value() for layer, mean in self._densities.items()},
            recalls=list(self.recalls),
            share=median(f.attention() / f.seconds for f in dense) if dense else None,
            step_seconds=(_median([f.seconds for f in dense]), _median([f.seconds for f in sparse])),
        )

    def _here(self) -> tuple[Site, int]:
        if self._site is None:
            raise RuntimeError("a meter was used outside of an attention; use it inside Policy.attend alone")
        return self._site


@dataclass(frozen=True)
class Report:
    """Of a run; `print` it for a table.

    seconds       by phase. "search" holds the dense attention it is fused with; "other" is the rest of the model's
                  forward passes, cross-attention included; "outside" the rest of the pipeline
    calls         attentions by phase
    forwards      forward passes of the model
    densities     by layer, float32 [H]: mean share of tiles kept in sparse attentions, forced tiles included
    recalls       what the chosen tiles hold of the weight, by the scores they were chosen by
    share         of attention in the time of a dense forward pass, the median; None if none was dense throughout
    step_seconds  median forward pass, (dense, sparse) throughout; None where there was none
    """

    seconds: dict[str, float]
    calls: dict[str, int]
    forwards: int
    densities: dict[str, Tensor]
    recalls: list[Recall]
    share: float | None
    step_seconds: tuple[float | None, float | None]

    @property
    def density(self) -> float | None:
        """Mean over layers and heads; None without a sparse attention."""
        return float(torch.stack(list(self.densities.values())).mean()) if self.densities else None

    @property
    def bound(self) -> float | None:
        """Amdahl: how much faster a forward pass would be if attention took no time at all."""
        return None if self.share is None or self.share >= 1 else 1 / (1 - self.share)

    @property
    def bound_at_density(self) -> float | None:
        """Amdahl: the same if attention took time in proportion to the tiles kept."""
        if self.share is None or self.density is None:
            return None
        return 1 / (1 - self.share * (1 - self.density))

    @property
    def speedup(self) -> float | None:
        """What a sparse forward pass gained over a dense one, measured."""
        dense, sparse = self.step_seconds
        return dense / sparse if dense is not None and sparse is not None else None

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        lines = ["phase         seconds   share     calls"]
        for name, seconds in self.seconds.items():
            calls = f"{self.calls[name]:10,}" if name in self.calls else ""
            lines.append(f"{name:11}{seconds:10.3f}{seconds / total:8.1%}{calls}")
        lines.append(f"{'total':11}{total:10.3f}{'':8}{self.forwards:10,} forward passes")
        lines += self._choices()
        lines.append(
            "speed: no forward pass was dense throughout; nothing to compare with"
            if self.share is None
            else f"speed: attention is {self.share:.1%} of a dense forward pass, so at most {_times(self.bound)} faster"
            f"; {_times(self.bound_at_density)} at this density; measured {_times(self.speedup)}"
        )
        return "\n".join(lines)

    def _choices(self) -> list[str]:
        """Lines on density and recall by layer."""
        if not self.densities:
            return ["density: nothing was sparse"]
        width = max(5, *map(len, self.densities))
        recalls: dict[str, list[Tensor]] = defaultdict(list)
        for entry in self.recalls:
            recalls[entry.layer].append(entry.recall.float().cpu())
        lines = [f"{'layer':{width}}  density  by head                    recall  lowest head"]
        for layer, heads in self.densities.items():
            found = recalls.get(layer)
            recall = f"{torch.cat(found).mean():8.3f}{torch.cat(found).min():13.3f}" if found else ""
            spread = f"{heads.min():.3f} to {heads.max():.3f}"
            lines.append(f"{layer:{width}}{heads.mean():9.3f}  {spread:25}{recall}")
        lines.append(f"density: {self.density:.3f} of all tiles in sparse attentions")
        return lines


_ORDER = ("dense", "search", "selection", "sparse")


@dataclass
class _Forward:
    """One forward pass, and the phases in it with their seconds."""

    start: float
    seconds: float = 0.0
    spans: list[tuple[str, float]] = field(default_factory=list)

    def attention(self) -> float:
        return sum(seconds for _, seconds in self.spans)

    def phases(self) -> set[str]:
        return {name for name, _ in self.spans}


@dataclass
class _Mean:
    """Of densities, by head, left where they are until they are asked for."""

    total: Tensor | None = None
    count: int = 0

    def add(self, density: Tensor) -> None:
        heads = density.float().mean(0)
        self.total = heads if self.total is None else self.total + heads
        self.count += 1

    def value(self) -> Tensor:
        assert self.total is not None
        return self.total.cpu() / self.count


def _now() -> float:
    """Seconds, when all that was asked of the GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _ordered(values: dict[str, Any]) -> dict[str, Any]:
    """By the order in which phases happen; a policy's own come last."""
    names = [name for name in _ORDER if name in values] + [name for name in values if name not in _ORDER]
    return {name: values[name] for name in names}


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _times(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} times"
