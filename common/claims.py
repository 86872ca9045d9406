"""Claims of a paper (`claims.yaml`) and the verdict that a record of measurements gives each of them.

A claim says what should come out (`expect`, or for `kind: value` the printed number), of which expression over recorded
metrics, and what the measurement needs to count. `load` reads and checks the file; `judge` compares. Verdicts:

    reproduced    the seeds' confidence interval lies inside the expectation
    refuted       it lies outside
    inconclusive  it reaches across the border, or there are fewer seeds than the claim asks for; one never decides
    not tested    the record does not meet the claim's needs (profile, device, data); the reason says how to get there
    error         the measurement is missing or cannot answer the claim

The expectation is `expect` if given, else the printed number as the interval it stands for: "34.75" is 34.745..34.755.
`tolerance` widens two-sided expectations ("34.75", "= 4", "29.5..30.5"). It never softens a one-sided one: the sign
*is* the claim. There it belongs to the printed size, on which the reason reports beside the verdict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any

from common import stats
from common.expressions import Expression, Measured, MetricError, Metrics, nearest
from common.params import PROFILES

KINDS = ("value", "order", "trend", "invariant", "speed", "memory")
REPRODUCED, REFUTED, INCONCLUSIVE = "reproduced", "refuted", "inconclusive"
NOT_TESTED, ERROR = "not tested", "error"
VERDICTS = (REPRODUCED, REFUTED, INCONCLUSIVE, NOT_TESTED, ERROR)


class ClaimError(ValueError):
    """`claims.yaml` breaks the schema; the message names file, line and claim."""


@dataclass(frozen=True)
class Band:
    """The values an expectation allows; an end is open if the value itself is excluded ("> 0")."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def contains(self, low: float, high: float) -> bool:
        """Whether all of `low..high` is allowed."""
        above = low > self.low if self.low_open else low >= self.low
        below = high < self.high if self.high_open else high <= self.high
        return above and below

    def excludes(self, low: float, high: float) -> bool:
        """Whether none of `low..high` is allowed."""
        above = low >= self.high if self.high_open else low > self.high
        below = high <= self.low if self.low_open else high < self.low
        return above or below

    @property
    def two_sided(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def widened(self, margin: float) -> Band:
        return Band(self.low - margin, self.high + margin, self.low_open, self.high_open)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"= {self.low:.6g}"
        if self.two_sided:
            return f"{self.low:.6g}..{self.high:.6g}"
        if math.isfinite(self.low):
            return f"{'>' if self.low_open else '>='} {self.low:.6g}"
        return f"{'<' if self.high_open else '<='} {self.high:.6g}"


@dataclass(frozen=True)
class Tolerance:
    """How far a measured value may lie from the printed one, absolutely or relative to it, and why."""

    amount: float
    relative: bool
    why: str

    def margin(self, around: float) -> float:
        return self.amount * abs(around) if self.relative else self.amount


@dataclass(frozen=True)
class Needs:
    """What a measurement must have to count: a profile at least this high, a kind of device, named data sets."""

    profile: str
    device: str = ""
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One entry of `claims.yaml`; `expect` and `claimed` are as written, `band` is what they allow.

    `seeds` is the number needed (0: the measurement does not vary with a seed); `proxy_of` names the full-scale claim
    of the same paper that this smaller one stands in for, and `scale` says how much smaller it is.
    """

    paper: str
    id: str
    text: str
    source: str
    kind: str
    metric: Expression
    claimed: str
    expect: str
    band: Band
    needs: Needs
    seeds: int
    tolerance: Tolerance | None = None
    proxy_of: str = ""
    scale: str = ""

    @property
    def printed(self) -> Band | None:
        """The interval of the printed number, widened by the tolerance; None if none is printed."""
        band = printed_interval(self.claimed)
        if band is None or self.tolerance is None:
            return band
        return band.widened(self.tolerance.margin((band.low + band.high) / 2))


@dataclass(frozen=True)
class Verdict:
    """What one record says about one claim; `measured` is the mean over `seeds` with its 95 % interval `low..high`.

    Numbers are None where nothing was measured, and `low`, `high` also for a single seed, which has no interval.
    """

    verdict: str
    reason: str
    profile: str
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    device: str = ""
    run: str = ""


def load(path: str | Path) -> list[Claim]:
    """Read and check `papers/<slug>/claims.yaml`; the folder names the paper.

    Raises:
        ClaimError: the file is missing, empty or breaks the schema (with file, line and the nearest valid name).
    """
    from common.claim_file import read  # needs a YAML library, which `import common.claims` must not

    return read(Path(path))


def judge(
    claim: Claim,
    metrics: Metrics | None,
    provenance: Mapping[str, Any] | None,
    profile: str,
    *,
    due: bool = True,
) -> Verdict:
    """Judge `claim` by what one execution of its paper at `profile` recorded.

    Args:
        metrics: the `metrics` part of `results/metrics/<slug>/<profile>.json`; None if there is no such file.
        provenance: the matching provenance; of it `status` (of a run that left no
            metrics), `device`, `data` and `run` are read.
        due: whether a missing measurement is a fault (the profile is the one being run) or merely not done yet.
    """
    _require_profile(profile)
    origin = provenance or {}
    verdict = partial(
        Verdict, profile=profile, device=str(origin.get("device") or ""), run=str(origin.get("run") or "")
    )
    if unmet := _unmet_profile(claim, profile):
        return verdict(NOT_TESTED, unmet)
    if metrics is None:
        return verdict(*_missing(claim, origin, profile, due))
    if unmet := _unmet_by_run(claim, origin):
        return verdict(NOT_TESTED, unmet)
    try:
        measured = claim.metric.evaluate(metrics)
        _require_seeding(claim, measured)
    except MetricError as error:
        return verdict(ERROR, str(error))
    outcome, reason, interval = _compare(claim, measured)
    low, high = (interval.low, interval.high) if math.isfinite(interval.low) else (None, None)
    return verdict(outcome, reason, measured=interval.mean, low=low, high=high, seeds=len(measured.seeds))


def expectation(text: str) -> Band:
    """Read `> 0`, `>= 0`, `< 1e-6`, `<= 1`, `= 4` or `29.5..30.5`.

    Raises:
        ValueError: the text is none of these, or an interval with its ends swapped.
    """
    number = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    if match := re.fullmatch(rf"\s*(<=|>=|<|>|=)\s*{number}\s*", text):
        sign, value = match[1], float(match[2])
        if sign == "=":
            return Band(value, value)
        return Band(low=value, low_open=sign == ">") if sign[0] == ">" else Band(high=value, high_open=sign == "<")
    if match := re.fullmatch(rf"\s*{number}\s*\.\.\s*{number}\s*", text):
        low, high = float(match[1]), float(match[2])
        if low <= high:
            return Band(low, high)
        raise ValueError(f"got the interval {text!r}, expected its lower end first; swap the ends.")
    raise ValueError(f"got {text!r}, expected '> 0', '>= 0', '< 1e-6', '<= 1', '= 4' or '29.5..30.5' in quotes.")


def printed_interval(text: str) -> Band | None:
    """The interval a printed number stands for, ± half its last digit; a unit may follow. None if it is no number."""
    match = re.fullmatch(r"\s*([-+−]?[\d.]+(?:[eE][-+]?\d+)?)\s*([^\d\s.,±][^\d]*)?", text)
    if match is None:
        return None
    try:
        number = Decimal(match[1].replace("−", "-"))
    except InvalidOperation:
        return None
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int):
        return None
    half = Decimal(5).scaleb(exponent - 1)
    return Band(float(number - half), float(number + half))


def _unmet_profile(claim: Claim, profile: str) -> str:
    if PROFILES.index(profile) >= PROFILES.index(claim.needs.profile):
        return ""
    return f"needs the {claim.needs.profile} profile: {_command(claim, claim.needs.profile)}"


def _unmet_by_run(claim: Claim, origin: Mapping[str, Any]) -> str:
    device, used = str(origin.get("device", "")), origin.get("data") or ()
    if claim.needs.device and not device.startswith(claim.needs.device):
        return f"needs a {claim.needs.device} device; this run used {device or 'an unnamed one'}"
    missing = [name for name in claim.needs.data if name not in used]
    if missing:
        return f"needs the data {', '.join(missing)}; this run used {', '.join(used) or 'none that is registered'}"
    return ""


def _missing(claim: Claim, origin: Mapping[str, Any], profile: str, due: bool) -> tuple[str, str]:
    status = str(origin.get("status", ""))
    if status:
        return ERROR, f"no measurement, {status}; run it again: {_command(claim, profile)}"
    if due:
        return ERROR, f"no measurement; run it: {_command(claim, profile)}"
    return NOT_TESTED, f"not run at this profile yet: {_command(claim, profile)}"


def _command(claim: Claim, profile: str) -> str:
    return f"resparse run {claim.paper} --profile {profile}"


def _require_seeding(claim: Claim, measured: Measured) -> None:
    if claim.seeds == 0 and measured.seeds:
        raise MetricError(
            f"the claim says seeds: 0, but {claim.metric.text!r} was recorded for seeds {', '.join(measured.seeds)}; "
            "record it without a seed, or give the claim the number of seeds it needs."
        )
    if claim.seeds > 0 and not measured.seeds:
        raise MetricError(
            f"the claim needs {claim.seeds} seeds, but {claim.metric.text!r} was recorded without any; record it with "
            "seed=..., or say seeds: 0 if nothing in it varies."
        )


def _compare(claim: Claim, measured: Measured) -> tuple[str, str, stats.Interval]:
    if not measured.seeds:
        value = measured.values[0]
        interval = stats.Interval(value, value, value, 1, "exact")
        inside = claim.band.contains(value, value)
        reason = f"{value:.6g} {'meets' if inside else 'does not meet'} {claim.band}"
        return (REPRODUCED if inside else REFUTED), reason + _size(claim, interval), interval
    interval = stats.interval(measured.values)
    dropped = f"; without seeds {', '.join(measured.left_out)}, not in every arm" if measured.left_out else ""
    if interval.n == 1:
        return INCONCLUSIVE, f"one seed never decides; the claim asks for {claim.seeds}{dropped}", interval
    span = f"{interval.low:.4g}..{interval.high:.4g} ({interval.n} seeds, 95 %)"
    if interval.n < claim.seeds:
        return INCONCLUSIVE, f"{interval.n} of the {claim.seeds} seeds asked for; {span}{dropped}", interval
    if claim.band.contains(interval.low, interval.high):
        p = stats.equivalence(measured.values, claim.band.low, claim.band.high)
        verdict, reason = REPRODUCED, f"{span} lies inside {claim.band} (p = {p:.2g})"
    elif claim.band.excludes(interval.low, interval.high):
        verdict, reason = REFUTED, f"{span} lies outside {claim.band}"
    else:
        verdict, reason = INCONCLUSIVE, f"{span} reaches across {claim.band}"
    return verdict, reason + _size(claim, interval) + dropped, interval


def _size(claim: Claim, interval: stats.Interval) -> str:
    """For a one-sided expectation with a printed number: how the measured size compares with the printed one."""
    printed = claim.printed
    if claim.band.two_sided or printed is None:
        return ""
    about = claim.claimed
    if claim.tolerance is not None:
        about += f" ± {claim.tolerance.amount:g}" + (" of it" if claim.tolerance.relative else "")
    if printed.contains(interval.low, interval.high):
        return f"; the size agrees with the printed {about}"
    if printed.excludes(interval.low, interval.high):
        return f"; the size differs from the printed {about}"
    return f"; the size may or may not be the printed {about}"


def _require_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise ValueError(
            f"got profile {profile!r}, expected one of {', '.join(PROFILES)}; {nearest(profile, PROFILES)}"
        )
