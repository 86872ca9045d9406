"""Runs of `resparse sparsify` within the tests' process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from pipelines import cli

SMALL = ("--length", "16", "--batch", "2", "--calibration", "5", "--held-out", "200", "--steps", "4", "--device", "cpu")


def invoke(*arguments: object) -> Any:
    typed = ["sparsify", *map(str, arguments)]
    return CliRunner().invoke(cli.app, typed, env={"COLUMNS": "200", "TERM": "dumb"})


def done(*arguments: object) -> str:
    """The output of a run that has to succeed."""
    result = invoke(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    """The one line that `main` would print."""
    error = invoke(*arguments).exception
    assert error is not None and not isinstance(error, SystemExit)
    assert cli._is_for_users(error), f"would be shown with its traceback: {error!r}"
    assert "\n" not in str(error)
    return str(error)
