"""An executed notebook as one HTML file that needs no network: no scripts, pictures and formulas inside it."""

from __future__ import annotations

import base64
import html
import io
import re
from typing import Any

_CODE = r"```.*?```|`[^`\n]*`"
_MATH = re.compile(rf"(?P<code>{_CODE})|\$\$(?P<display>.+?)\$\$|(?<![\\\w$])\$(?P<inline>[^$\n]+?)\$(?![\w$])", re.S)


def render(notebook: Any, title: str) -> str:
    """The page as text.

    Formulas become pictures drawn by matplotlib, with their source as the alternative text; those that it cannot draw
    stay as source. MathJax, the usual way, would have to come from the network.
    """
    from nbconvert import HTMLExporter

    notebook = notebook.copy()
    notebook.cells = [_with_drawn_formulas(cell) for cell in notebook.cells]
    exporter = HTMLExporter(
        template_name="lab",
        embed_images=True,
        exclude_anchor_links=True,
        mathjax_url="",
        require_js_url="",
        jquery_url="",
        mermaid_js_url="",
    )
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    return _SCRIPT.sub("", body)


# what is left of them only loads widgets and diagrams from elsewhere
_SCRIPT = re.compile(r"<script\b.*?</script>", re.S | re.I)


def _with_drawn_formulas(cell: Any) -> Any:
    if cell.cell_type != "markdown" or "$" not in cell.source:
        return cell
    cell = cell.copy()
    cell.source = _MATH.sub(_formula, cell.source)
    return cell


def _formula(match: re.Match[str]) -> str:
    if match["code"]:
        return match["code"]
    source, display = match["display"] or match["inline"], match["display"] is not None
    drawn = _draw(" ".join(source.split()))
    if drawn is None:
        return f"`{' '.join(source.split())}`" if "`" not in source else match[0]
    svg, height, depth = drawn
    size = f"height:{height:.3f}em;vertical-align:{-depth:.3f}em"
    image = (
        f'<img alt="{html.escape(source.strip())}" style="{size}" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
    )
    return f'<div style="text-align:center">{image}</div>' if display else image


def _draw(source: str) -> tuple[bytes, float, float] | None:
    """The formula as SVG, with its height and its depth below the baseline in em; None if it cannot be drawn."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    points = 10.0
    try:
        with rc_context({"mathtext.fontset": "cm", "svg.fonttype": "path", "svg.hashsalt": "resparse"}):
            font = FontProperties(size=points)
            width, height, depth, *_ = MathTextParser("path").parse(f"${source}$", dpi=72, prop=font)
            figure = Figure(figsize=(width / 72, height / 72))
            figure.text(0, depth / height, f"${source}$", fontproperties=font)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    except ValueError:  # a command that mathtext does not know
        return None
    return buffer.getvalue(), height / points, depth / points
