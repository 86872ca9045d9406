"""The schema of `claims.yaml`, checked entry by entry so that a mistake is answered with its line and the way out.

The file is a list of entries:

    - id: srste-over-ste                    # kebab-case, unique in the file
      text: At 1:8, SR-STE ends above STE at equal epochs.
      source: {table: 2}                    # where in the paper; `ours` for a check that is not the authors'
      kind: order                           # value | order | trend | invariant | speed | memory
      metric: top1[sr_ste] - top1[ste]      # common/expressions.py
      claimed: "1.3"                        # as printed, in quotes; may be words; optional for `source: ours`
      expect: "> 0"                         # "> 0" | "< 1e-6" | "= 4" | "29.5..30.5"; only `kind: value` may omit it
      tolerance: {abs: 0.5, why: the paper's own spread}      # or rel: 0.1; optional
      needs: {profile: laptop, device: cuda, data: [imagenet]}       # device and data are optional
      seeds: 5                              # 0: nothing varies with a seed; never 1
      proxy_of: srste-r18-imagenet          # optional; then scale says how much smaller:
      scale: ResNet-8 on 32 px patches instead of ResNet-18 on ImageNet
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import claims
from common.claims import Band, Claim, ClaimError, Needs, Tolerance
from common.expressions import Expression, nearest
from common.params import PROFILES

_FIELDS = ("id", "text", "source", "kind", "metric", "claimed", "expect", "tolerance", "needs", "seeds", "proxy_of")
_FIELDS += ("scale",)
_REQUIRED = ("id", "text", "source", "kind", "metric", "needs", "seeds")


def read(path: Path) -> list[Claim]:
    """Read, check and return the claims of one file, in its order; raises `ClaimError`."""
    entries = _parse(path)
    found: dict[str, tuple[Claim, _Entry]] = {}
    for entry in entries:
        claim = _claim(path.resolve().parent.name, entry)
        if claim.id in found:
            raise entry.fault("id", f"got the id {claim.id!r} a second time, expected unique ids; rename one of them.")
        found[claim.id] = claim, entry
    for claim, entry in found.values():
        _require_target(claim, entry, {other: claim for other, (claim, _) in found.items()})
    return [claim for claim, _ in found.values()]


class _Entry:
    """One mapping of the file together with its place, which every error names."""

    def __init__(self, path: Path, content: Any, line: int, name: str) -> None:
        self.path, self.content, self.line, self.name = path, content, line, name

    def fault(self, key: str, message: str) -> ClaimError:
        line = self.line
        if key in self.content:
            line = self.content.lc.key(key)[0] + 1
        return ClaimError(f"{self.path}:{line}: {self.name}: {message}")

    def text(self, key: str, *, what: str = "text") -> str:
        """The field as a stripped string; a missing optional field is empty."""
        value = self.content.get(key, "")
        if not isinstance(value, str):
            raise self.fault(key, f"{key} got {value!r}, expected {what} in quotes, so that it is kept as printed.")
        if key in self.content and not value.strip():
            raise self.fault(key, f"{key} is empty, expected {what}; write it or remove the key.")
        return " ".join(value.split())

    def read(self, key: str, parse: Callable[[str], Any], what: str) -> Any:
        """The field through `parse`, whose ValueError becomes this file's error."""
        try:
            return parse(self.text(key, what=what))
        except ClaimError:
            raise
        except ValueError as error:
            raise self.fault(key, f"{key}: {error}") from None

    def require_keys(self, allowed: tuple[str, ...], required: tuple[str, ...]) -> None:
        for key in self.content:
            if key not in allowed:
                raise self.fault(key, f"got the unknown key {key!r}; {nearest(str(key), allowed)}")
        missing = [key for key in required if key not in self.content]
        if missing:
            raise self.fault("id", f"lacks {', '.join(missing)}; see the example at the top of common/claim_file.py.")

    def part(self, key: str) -> _Entry:
        """A nested mapping as an entry of its own."""
        value = self.content[key]
        if not isinstance(value, Mapping):
            raise self.fault(key, f"{key} got {value!r}, expected a mapping such as {{profile: smoke}}.")
        return _Entry(self.path, value, self.content.lc.key(key)[0] + 1, f"{self.name}: {key}")


def _parse(path: Path) -> list[_Entry]:
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedSeq
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise ClaimError(
            f"{path} does not exist, expected the paper's claims; `resparse new <slug>` writes a first one."
        )
    try:
        content = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise ClaimError(f'{path} is not YAML: {reason} (expectations such as "> 0" need their quotes)') from None
    if not content:
        raise ClaimError(f"{path} holds no claim, expected at least one; a paper without a claim is not on the board.")
    if not isinstance(content, CommentedSeq):
        raise ClaimError(f"{path} holds a {type(content).__name__}, expected a list; start every claim with '- id: '.")
    entries = []
    for number, item in enumerate(content):
        line = content.lc.item(number)[0] + 1
        if not isinstance(item, Mapping):
            raise ClaimError(f"{path}:{line}: got {item!r}, expected a claim (a mapping that starts with '- id: ').")
        entries.append(_Entry(path, item, line, f"claim {item.get('id', number + 1)!r}"))
    return entries


def _claim(paper: str, entry: _Entry) -> Claim:
    entry.require_keys(_FIELDS, _REQUIRED)
    name = entry.text("id")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise entry.fault("id", f"got the id {name!r}, expected kebab-case such as 'teacher-helps'.")
    kind = entry.text("kind")
    if kind not in claims.KINDS:
        raise entry.fault(
            "kind", f"got kind {kind!r}, expected one of {', '.join(claims.KINDS)}; {nearest(kind, claims.KINDS)}"
        )
    source, claimed = _source(entry), entry.text("claimed", what="the number or words of the paper")
    if source != "ours" and not claimed:
        raise entry.fault("claimed", "lacks claimed, expected what the paper prints; only `source: ours` may omit it.")
    tolerance = _tolerance(entry)
    return Claim(
        paper=paper,
        id=name,
        text=entry.text("text"),
        source=source,
        kind=kind,
        metric=entry.read("metric", Expression, "an expression over recorded metrics"),
        claimed=claimed,
        expect=entry.text("expect", what="an expectation such as '> 0'"),
        band=_band(entry, kind, claimed, tolerance),
        needs=_needs(entry),
        seeds=_seeds(entry, kind),
        tolerance=tolerance,
        proxy_of=entry.text("proxy_of"),
        scale=entry.text("scale"),
    )


def _source(entry: _Entry) -> str:
    value = entry.content["source"]
    if isinstance(value, Mapping) and value:
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return entry.text("source", what="{table: 2}, {section: 4.1} or ours")


def _band(entry: _Entry, kind: str, claimed: str, tolerance: Tolerance | None) -> Band:
    """What the claim allows; see `common/claims.py` for how tolerance enters."""
    printed = claims.printed_interval(claimed)
    if "expect" in entry.content:
        band = entry.read("expect", claims.expectation, "an expectation such as '> 0'")
    elif kind == "value" and printed is not None:
        band = printed
    elif kind == "value":
        raise entry.fault(
            "claimed",
            f"got claimed {claimed!r}, expected a printed number for kind: value; give one "
            "(a unit may follow) or add an expect.",
        )
    else:
        raise entry.fault("id", f"lacks expect, expected one for kind: {kind}; only kind: value may leave it out.")
    if tolerance is None:
        return band
    if band.two_sided:
        return band.widened(tolerance.margin((band.low + band.high) / 2))
    if printed is None:
        raise entry.fault(
            "tolerance",
            f"got a tolerance with expect {str(band)!r} and no printed number, expected "
            "something to widen: a sign is not softened; remove it, or move the border of expect.",
        )
    return band


def _tolerance(entry: _Entry) -> Tolerance | None:
    if "tolerance" not in entry.content:
        return None
    part = entry.part("tolerance")
    part.require_keys(("abs", "rel", "why"), ("why",))
    sizes = [key for key in ("abs", "rel") if key in part.content]
    if len(sizes) != 1:
        raise part.fault("why", f"got {sizes or 'neither abs nor rel'}, expected exactly one of abs and rel.")
    amount = part.content[sizes[0]]
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not amount > 0:
        raise part.fault(sizes[0], f"{sizes[0]} got {amount!r}, expected a number above 0; leave tolerance out for 0.")
    return Tolerance(float(amount), sizes[0] == "rel", part.text("why", what="the reason for this tolerance"))


def _needs(entry: _Entry) -> Needs:
    part = entry.part("needs")
    part.require_keys(("profile", "device", "data"), ("profile",))
    profile = part.text("profile")
    if profile not in PROFILES:
        raise part.fault(
            "profile",
            f"got profile {profile!r}, expected one of {', '.join(PROFILES)}; {nearest(profile, PROFILES)}",
        )
    device = part.text("device")
    if device not in ("", "cpu", "cuda"):
        raise part.fault("device", f"got device {device!r}, expected cpu or cuda; leave it out if either will do.")
    data = part.content.get("data", [])
    names = [data] if isinstance(data, str) else data
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise part.fault(
            "data", f"data got {data!r}, expected a registered name or a list of them; see `resparse data list`."
        )
    return Needs(profile, device, tuple(names))


def _seeds(entry: _Entry, kind: str) -> int:
    seeds = entry.content["seeds"]
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 0 or seeds == 1:
        raise entry.fault(
            "seeds", f"seeds got {seeds!r}, expected 0 (nothing varies) or at least 2: one seed never decides."
        )
    if kind == "speed" and seeds == 0:
        raise entry.fault(
            "seeds",
            "got seeds: 0 for a speed, expected at least 2: timings vary, so record repeats of "
            "the same process as seeds.",
        )
    return int(seeds)


def _require_target(claim: Claim, entry: _Entry, known: Mapping[str, Claim]) -> None:
    if not claim.proxy_of:
        return
    others = [name for name in known if name != claim.id]
    if claim.proxy_of not in others:
        raise entry.fault(
            "proxy_of",
            f"got proxy_of {claim.proxy_of!r}, expected another claim of this file; {nearest(claim.proxy_of, others)}",
        )
    if not claim.scale:
        raise entry.fault("proxy_of", "got a stand-in without scale, expected how much smaller it is than the paper.")
    target = known[claim.proxy_of]
    if target.proxy_of or target.needs == claim.needs:
        raise entry.fault(
            "proxy_of",
            f"{target.id!r} is itself a stand-in or needs no more than this claim, expected "
            "the full-scale claim; drop proxy_of if both can be measured in one run.",
        )
