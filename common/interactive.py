"""What a notebook opened by hand gets at its end: its claims as a table, and one tracked run.

Neither may ever break the notebook: whatever goes wrong is one printed line.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import paths


def show_claims(slug: str, profile: str, metrics: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Judge the paper's claims by these metrics and show them as a table."""
    path = paths.paper(slug) / "claims.yaml"
    if not path.is_file():
        print(f"resparse: {paths.relative(path)} does not exist, so there is no verdict to show")
        return
    try:
        from common import claims

        rows = [(claim, claims.judge(claim, metrics, origin, profile)) for claim in claims.load(path)]
    except Exception as error:
        print(f"resparse: the claims cannot be judged here: {error}")
        return
    header = ("claim", "expected", "measured", "verdict", "why")
    table = [(c.text, c.expect or c.claimed, _measured(v), v.verdict, v.reason) for c, v in rows]
    _display(header, table)


def track(slug: str, profile: str, folder: Path) -> None:
    """Log the finished run with the tag `interactive`."""
    try:
        from common import tracking

        print(tracking.log_interactive(slug, profile, folder))
    except Exception as error:
        print(f"resparse: this run is not tracked ({str(error).splitlines()[0]}); its files are in {folder}")


def _measured(verdict: Any) -> str:
    if verdict.measured is None:
        return "-"
    if verdict.low is None:
        return f"{verdict.measured:.4g}"
    return f"{verdict.measured:.4g} ({verdict.low:.4g} to {verdict.high:.4g}, {verdict.seeds} seeds)"


def _display(header: tuple[str, ...], table: list[tuple[str, ...]]) -> None:
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    if not shell:
        for row in table:
            print(" | ".join(row))
        return
    from IPython.display import HTML, display

    rows = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in table)
    heads = "".join(f"<th>{name}</th>" for name in header)
    display(HTML(f"<table style='text-align:left'><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"))
