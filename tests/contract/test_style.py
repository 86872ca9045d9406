"""Code as craft, the part a machine can check: ruff's rules and ours that ruff does not have."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "kernels", "papers", "pipelines")
SOURCES = [path for package in (*PACKAGES, "tests") for path in sorted((ROOT / package).rglob("*.py"))]
# called for their value; as a statement of their own they check nothing
COMPARISONS = {"all", "allclose", "any", "array_equal", "array_equiv", "equal", "isclose", "issubset", "startswith"}
LONGEST_FUNCTION = 60  # lines without the docstring


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff_has_nothing_to_say(command: str) -> None:
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "."]
    result = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, (
        f"run make format; ruff {command} says:\n{result.stdout[-3000:]}{result.stderr[-500:]}"
    )


def discarded_comparisons(source: str) -> list[int]:
    """Lines where a comparison is called as a statement, so that its result is dropped and the check cannot fail."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in COMPARISONS:
                lines.append(node.lineno)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare | ast.BoolOp):
            lines.append(node.lineno)
    return lines


def long_functions(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            start = node.body[0].end_lineno + 1 if documented else node.lineno
            length = (node.end_lineno or start) - start + 1
            if length > LONGEST_FUNCTION:
                found.append(f"{node.name} ({length} lines)")
    return found


def test_no_comparison_is_called_for_nothing() -> None:
    found = [f"{p.relative_to(ROOT)}:{line}" for p in SOURCES for line in discarded_comparisons(p.read_text())]
    assert not found, f"these comparisons drop their result; assert it: {found}"


def test_no_function_is_too_long_to_read() -> None:
    found = [f"{path.relative_to(ROOT)}: {name}" for path in SOURCES for name in long_functions(path.read_text())]
    assert not found, f"more than {LONGEST_FUNCTION} lines without docstring; a part of it wants a name: {found}"


@pytest.mark.parametrize(
    "statement", ["np.array_equal(a, b)", "torch.allclose(a, b)", "a.equal(b)", "isclose(a, b)", "a == b", "a < b < c"]
)
def test_the_lint_sees_a_dropped_comparison(statement: str) -> None:
    assert discarded_comparisons(f"x = 1\n{statement}\n") == [2]
    kept = statement.replace("a == b", "(a == b)")
    assert discarded_comparisons(f"assert {kept}\nx = ({kept})\nf({kept})\n") == []
    assert discarded_comparisons("np.testing.assert_allclose(a, b)\n") == []


def test_the_lint_measures_functions_without_their_docstring() -> None:
    body = "    x = 1\n" * LONGEST_FUNCTION
    text = '    """\n' + "    words\n" * 30 + '    """\n'
    assert long_functions(f"def f():\n{text}{body}") == []
    assert long_functions(f"def f():\n{text}{body}    return x\n") == [f"f ({LONGEST_FUNCTION + 1} lines)"]
