"""Parameters: what wins over what, what is refused, and what the refusal says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from common import params


@dataclasses.dataclass(frozen=True)
class Params:
    seeds: list[int]
    dataset: str
    rate: float
    arm: Literal["fbp", "tv"] = "fbp"
    clamp: bool = True
    steps: int = 10
    limit: float | None = None
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; expected at least 1")


YAML = """\
base:
  seeds: [0, 1, 2]
  dataset: made
  rate: 1e-4
smoke:
  seeds: [0]
laptop:
  rate: 2
  limit: 0.5
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "papers" / "toy").mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text("")
    monkeypatch.chdir(tmp_path)

    def write(text: str = YAML) -> None:
        (tmp_path / "papers" / "toy" / "params.yaml").write_text(text)

    write()
    return write


def test_overrides_win_over_the_profile_and_that_over_base(write) -> None:
    assert params.load(Params, "toy", "smoke").seeds == [0]
    laptop = params.load(Params, "toy", "laptop", {"rate": 3, "arm": "tv", "limit": None})
    assert laptop == Params(seeds=[0, 1, 2], dataset="made", rate=3.0, arm="tv", limit=0.5)
    assert type(laptop.rate) is float, "an int is welcome where a float is meant, and becomes one"


def test_numbers_are_what_they_look_like(write) -> None:
    rate = params.load(Params, "toy", "smoke").rate
    assert rate == 0.0001 and type(rate) is float  # YAML 1.1 loaders give the text "1e-4"


def test_resolved_holds_plain_types_only(write) -> None:
    values = params.resolved(params.load(Params, "toy", "smoke", {"weights": [1, 2.5]}))
    assert values["weights"] == [1.0, 2.5] and type(values["weights"]) is list
    assert {type(value) for value in values.values()} <= {list, str, float, bool, int, type(None)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smoke: {raet: 1}", ["papers/toy/params.yaml:8", "(smoke)", "'raet'", "Did you mean 'rate'?"]),
        ("smoke: {rate: fast}", ["papers/toy/params.yaml:8", "'fast' (str)", "expected float"]),
        ("smoke: {steps: true}", ["True (bool)", "expected int"]),
        ("smoke: {steps: 1.0}", ["1.0 (float)", "expected int"]),
        ("smoke: {clamp: 1}", ["1 (int)", "expected bool"]),
        ("smoke: {dataset: 3}", ["3 (int)", "expected str"]),
        ("smoke: {seeds: 3}", ["3 (int)", "a list of int"]),
        ("smoke: {seeds: [0, x]}", ["a list of int", "Element 1 is 'x'"]),
        ("smoke: {arm: fbq}", ["one of 'fbp', 'tv'", "Did you mean 'fbp'?"]),
        ("smoke: {limit: much}", ["'much' (str)", "float or null"]),
        ("smoke: {steps: 0}", ["papers/toy/params.yaml", "expected at least 1"]),
        ("smoke: 3", ["block 'smoke'", "expected a mapping"]),
        ("smoke: {rate: [}", ["not valid YAML"]),
    ],
)
def test_a_misfit_is_refused_with_place_value_and_expectation(write, text: str, said: list[str]) -> None:
    write(YAML.replace("smoke:\n  seeds: [0]\n", "").rstrip() + "\n" + text + "\n")
    with pytest.raises(params.ParamError) as caught:
        params.load(Params, "toy", "smoke")
    for part in said:
        assert part in str(caught.value), f"{part!r} not in {caught.value}"


def test_an_unknown_profile_is_refused_with_those_that_exist(write) -> None:
    with pytest.raises(params.ParamError, match=r"'laptpo'; expected one of smoke, laptop\. Did you mean 'laptop'"):
        params.load(Params, "toy", "laptpo")


def test_a_field_without_a_value_is_named(write) -> None:
    write("base: {seeds: [0], dataset: made}\nsmoke: {}\n")
    with pytest.raises(params.ParamError, match="no value for rate"):
        params.load(Params, "toy", "smoke")


def test_an_unknown_override_is_refused(write) -> None:
    with pytest.raises(params.ParamError, match=r"override: unknown parameter 'stepz'.*Did you mean 'steps'"):
        params.load(Params, "toy", "smoke", {"stepz": None})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("rate=1e-4", 0.0001),
        ("rate=2", 2.0),
        ("seeds=0..3,7", [0, 1, 2, 3, 7]),
        ("seeds=", []),
        ("weights=1,2e-1", (1.0, 0.2)),
        ("arm=tv", "tv"),
        ("clamp=false", False),
        ("limit=none", None),
        ("limit=3", 3.0),
        ("dataset=a=b", "a=b"),
    ],
)
def test_an_assignment_is_read_by_the_type_of_its_field(text: str, value: object) -> None:
    name, got = params.parse_assignment(Params, text)
    assert (name, got, type(got)) == (text.partition("=")[0], value, type(value))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate", "expected name=value"),
        ("raet=1", "Did you mean 'rate'"),
        ("rate=fast", "expected float"),
        ("steps=1.5", "expected int"),
        ("arm=fbq", "Did you mean 'fbp'"),
        ("clamp=1", "true or false"),
        ("seeds=0..x", "a list of int"),
    ],
)
def test_a_bad_assignment_is_refused(text: str, said: str) -> None:
    with pytest.raises(params.ParamError, match=said):
        params.parse_assignment(Params, text)


def test_a_sweep_is_several_values_of_one_field() -> None:
    assert params.parse_sweep(Params, "rate=1e-4,1e-3") == ("rate", [0.0001, 0.001])
    assert params.parse_sweep(Params, "steps=1..3") == ("steps", [1, 2, 3])
    assert params.parse_sweep(Params, "seeds=0..2") == ("seeds", [[0], [1], [2]])


def test_the_house_names_its_profile_and_papers(tmp_path: Path, write) -> None:
    (tmp_path / "params.yaml").write_text("profile: laptop\npapers: [toy]\n")
    assert params.house() == ("laptop", ["toy"])
    (tmp_path / "params.yaml").write_text("papers: [toy]\n")
    with pytest.raises(params.ParamError, match="expected `profile:`"):
        params.house()


def test_an_unknown_paper_is_refused_with_the_nearest(write) -> None:
    with pytest.raises(params.ParamError, match=r"no paper 'tyo'.*Did you mean 'toy'"):
        params.settings("tyo")


def test_dump_is_read_back_the_same(tmp_path: Path) -> None:
    values = {"rate": 1e-7, "seeds": [0, 1], "limit": None, "clamp": False, "dataset": "no"}
    params.dump(values, tmp_path / "resolved.yaml")
    from ruamel.yaml import YAML as Loader

    assert Loader(typ="safe").load(tmp_path / "resolved.yaml") == values
