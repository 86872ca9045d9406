"""The little language of a claim's `metric`: recorded metrics, arithmetic and a few functions; nothing is executed.

    psnr[gloredi] - psnr[fbp]                        a metric is `name[variant]`, or `name` where it has no variants
    time[dense] / time[sparse]                       + - * / and parentheses, plain numbers
    increasing(psnr[18], psnr[36], psnr[72])         the least step from one argument to the next: > 0 is monotone
    decreasing(...)  min(...)  max(...)  mean(...)  abs(x)

An expression is evaluated once for each seed that all its metrics share, so compared arms stay paired; a metric
recorded without a seed (`all`) is the same for every seed.
"""

from __future__ import annotations

import difflib
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]  # name -> variant -> seed or "all" -> value

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)\s*(?:\[(?P<variant>[^\[\]]*)\])?"
    r"|(?P<sign>[-+*/(),]))"
)


class ExpressionError(ValueError):
    """The text is not an expression."""


class MetricError(ValueError):
    """The record cannot answer the expression: a metric is missing, seeds do not meet, a value is not finite."""


@dataclass(frozen=True)
class Measured:
    """What an expression came to: one value a shared seed, or one value and no seeds if nothing varies with a seed.

    `left_out` are seeds that some of the metrics have and others lack.
    """

    values: tuple[float, ...]
    seeds: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Number:
    value: float


@dataclass(frozen=True)
class _Metric:
    name: str
    variant: str

    def __str__(self) -> str:
        return f"{self.name}[{self.variant}]" if self.variant else self.name


@dataclass(frozen=True)
class _Call:
    function: Callable[..., float]
    arguments: tuple[_Number | _Metric | _Call, ...]


_Node = _Number | _Metric | _Call


class Expression:
    """A parsed expression; raises `ExpressionError` with the place of the fault."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._tree = _Parser(text).parse()

    @property
    def metrics(self) -> tuple[tuple[str, str], ...]:
        """The (name, variant) pairs that the expression reads, in order of appearance."""
        return tuple(dict.fromkeys((metric.name, metric.variant) for metric in _metrics(self._tree)))

    def evaluate(self, metrics: Metrics) -> Measured:
        """Evaluate on a record's metrics, paired by seed.

        Raises:
            MetricError: naming the metric, and the nearest recorded name for a typo.
        """
        found = {metric: _lookup(metric, metrics) for metric in _metrics(self._tree)}
        seeded = [set(values) for values in found.values() if "all" not in values]
        if not seeded:
            return Measured((self._value({metric: values["all"] for metric, values in found.items()}, "all"),))
        shared = sorted(set.intersection(*seeded), key=_seed_order)
        if not shared:
            names = "; ".join(f"{metric}: {', '.join(sorted(values))}" for metric, values in found.items())
            raise MetricError(
                f"the metrics of {self.text!r} share no seed: got {names}, expected the same seeds in compared arms; "
                "measure them on the same seeds."
            )
        values = tuple(
            self._value({metric: row.get("all", row.get(seed)) for metric, row in found.items()}, seed)
            for seed in shared
        )
        left_out = sorted(set.union(*seeded) - set(shared), key=_seed_order)
        return Measured(values, tuple(shared), tuple(left_out))

    def _value(self, values: Mapping[_Metric, Any], seed: str) -> float:
        for metric, value in values.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise MetricError(
                    f"{metric} is {value!r} (seed {seed}), expected a finite number; see what this run did before "
                    "judging by it."
                )
        try:
            return float(_evaluate(self._tree, values))
        except ZeroDivisionError:
            parts = ", ".join(f"{metric} = {value:g}" for metric, value in values.items())
            raise MetricError(f"{self.text!r} divides by zero (seed {seed}): {parts}; compare by difference.") from None


def nearest(name: str, names: Any) -> str:
    """`"; did you mean 'x'?"` for the closest of `names`, else the sorted list of them (at most twelve)."""
    known = sorted(str(other) for other in names)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + (", ".join(known[:12]) + (", ..." if len(known) > 12 else "") if known else "none at all")


def _increasing(*values: float) -> float:
    return min(after - before for before, after in itertools.pairwise(values))


def _decreasing(*values: float) -> float:
    return _increasing(*(-value for value in values))


def _mean(*values: float) -> float:
    return sum(values) / len(values)


# name: (function, least arguments, most arguments or None)
_FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int | None]] = {
    "min": (min, 2, None),
    "max": (max, 2, None),
    "mean": (_mean, 1, None),
    "abs": (abs, 1, 1),
    "increasing": (_increasing, 2, None),
    "decreasing": (_decreasing, 2, None),
}


class _Parser:
    """Recursive descent: sum = product {(+|-) product}; product = factor {(*|/) factor}; factor = [-] atom."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._tokenize()
        self._next = 0

    def parse(self) -> _Node:
        if not self._tokens:
            raise ExpressionError("the expression is empty; write a recorded metric such as psnr[fbp].")
        tree = self._sum()
        if self._next < len(self._tokens):
            raise self._fault("an operator or the end")
        if not any(_metrics(tree)):
            raise ExpressionError(f"{self._text!r} reads no metric; write a recorded metric such as psnr[fbp].")
        return tree

    def _tokenize(self) -> list[re.Match[str]]:
        tokens, place, end = [], 0, len(self._text.rstrip())
        while place < end:
            token = _TOKEN.match(self._text, place)
            if token is None:
                raise ExpressionError(
                    f"cannot read {self._text!r} from character {place + 1} on: got {self._text[place:].strip()!r}, "
                    "expected a metric, a number, one of + - * / ( ) or a comma; names are letters, digits and _."
                )
            tokens.append(token)
            place = token.end()
        return tokens

    def _sum(self) -> _Node:
        left = self._product()
        while sign := self._take("+", "-"):
            left = _Call(operator.add if sign == "+" else operator.sub, (left, self._product()))
        return left

    def _product(self) -> _Node:
        left = self._factor()
        while sign := self._take("*", "/"):
            left = _Call(operator.mul if sign == "*" else operator.truediv, (left, self._factor()))
        return left

    def _factor(self) -> _Node:
        if self._take("-"):
            return _Call(operator.sub, (_Number(0.0), self._factor()))
        if self._take("("):
            inner = self._sum()
            self._require(")")
            return inner
        token = self._peek()
        if token is None or token["sign"]:
            raise self._fault("a metric, a number or a bracket")
        self._next += 1
        if token["number"]:
            return _Number(float(token["number"]))
        if token["variant"] is None and self._take("("):
            return self._call(token["name"])
        return _Metric(token["name"], (token["variant"] or "").strip())

    def _call(self, name: str) -> _Node:
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        self._require(")")
        if name not in _FUNCTIONS:
            raise ExpressionError(f"{self._text!r} calls {name!r}, which is no function; {nearest(name, _FUNCTIONS)}")
        function, least, most = _FUNCTIONS[name]
        if len(arguments) < least or (most is not None and len(arguments) > most):
            bound = f"{least}" if most == least else f"at least {least}"
            raise ExpressionError(f"{name} got {len(arguments)} argument(s) in {self._text!r}, expected {bound}.")
        return _Call(function, tuple(arguments))

    def _peek(self) -> re.Match[str] | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take(self, *signs: str) -> str | None:
        token = self._peek()
        if token is None or token["sign"] not in signs:
            return None
        self._next += 1
        return token["sign"]

    def _require(self, sign: str) -> None:
        if not self._take(sign):
            raise self._fault(repr(sign))

    def _fault(self, expected: str) -> ExpressionError:
        token = self._peek()
        got = f"{token.group().strip()!r} at character {token.end()}" if token else "the end"
        return ExpressionError(
            f"cannot read {self._text!r}: got {got}, expected {expected}; see common/expressions.py."
        )


def _metrics(node: _Node) -> Iterator[_Metric]:
    if isinstance(node, _Metric):
        yield node
    elif isinstance(node, _Call):
        for argument in node.arguments:
            yield from _metrics(argument)


def _evaluate(node: _Node, values: Mapping[_Metric, float]) -> float:
    if isinstance(node, _Number):
        return node.value
    if isinstance(node, _Metric):
        return values[node]
    return node.function(*(_evaluate(argument, values) for argument in node.arguments))


def _lookup(metric: _Metric, metrics: Metrics) -> Mapping[str, float]:
    if metric.name not in metrics:
        raise MetricError(f"metric {metric.name!r} was not recorded; {nearest(metric.name, metrics)}")
    variants = metrics[metric.name]
    if metric.variant not in variants:
        got = f"variant {metric.variant!r}" if metric.variant else "no variant"
        raise MetricError(f"metric {metric.name!r} was not recorded for {got}; {nearest(metric.variant, variants)}")
    values = variants[metric.variant]
    if not values or ("all" in values and len(values) > 1):
        raise MetricError(
            f"{metric} was recorded for {sorted(values) or 'no seed'}, expected seeds or 'all' but not both; record it "
            "either with seed=... every time or never."
        )
    return values


def _seed_order(seed: str) -> tuple[int, str]:
    return (int(seed), "") if seed.lstrip("-").isdigit() else (0, seed)
