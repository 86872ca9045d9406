"""Parameters of a paper: base <- profile <- overrides, checked against the paper's dataclass.

`papers/<slug>/params.yaml` holds a block `base` and one block of differences a profile; the frozen dataclass `Params`
of `papers/<slug>/settings.py` says which names exist and which types they have. One YAML 1.2 loader reads them, so
that `1e-4` is the number it looks like.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from common import paths

PROFILES = ("smoke", "laptop", "paper")
T = TypeVar("T")


class ParamError(ValueError):
    """A parameter, profile or assignment that does not fit: what, got, expected, next step."""


def load(cls: type[T], slug: str, profile: str, overrides: Mapping[str, Any] | None = None) -> T:
    """The parameters of one run as an instance of `cls`.

    `overrides` win over the profile, the profile over `base`, that over the dataclass's defaults. An override of None
    means "the profile's value", which is what the parameters cell of a notebook says by default.

    Raises ParamError for an unknown profile or name, a value of the wrong type, or a field without a value.
    """
    path = paths.paper(slug) / "params.yaml"
    blocks = _read(path)
    available = [name for name in blocks if name != "base"]
    if profile not in available:
        raise ParamError(
            f"{paths.relative(path)}: unknown profile {profile!r}; expected one of {', '.join(available)}."
            f"{suggest(profile, available)}"
        )
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for block in ("base", profile):
        for name, value in (blocks.get(block) or {}).items():
            values[name] = _checked(hints, name, value, f"{_line(path, blocks[block], name)} ({block})")
    for name, value in (overrides or {}).items():
        if name not in hints:
            _refuse_name(hints, name, "override")
        if value is not None:
            values[name] = _checked(hints, name, value, "override")
    return _build(cls, values, paths.relative(path))


def resolved(params: Any) -> dict[str, Any]:
    """Every parameter with its value, in plain types that JSON and YAML can hold."""
    return {name: _plain(value) for name, value in dataclasses.asdict(params).items()}


def settings(slug: str) -> type:
    """The paper's dataclass, `papers.<slug>.settings.Params`.

    Raises ParamError when there is no such paper.
    """
    if not paths.notebook(slug).is_file():
        papers = sorted(path.parent.name for path in (paths.root() / "papers").glob("*/params.yaml"))
        raise ParamError(
            f"no paper {slug!r}: {paths.relative(paths.notebook(slug))} does not exist; expected one of "
            f"{', '.join(papers) or '(none yet)'}.{suggest(slug, papers)}"
        )
    if str(paths.root()) not in sys.path:
        sys.path.insert(0, str(paths.root()))
    return importlib.import_module(f"papers.{slug}.settings").Params


def parse_assignment(cls: type, text: str) -> tuple[str, Any]:
    """Read `name=value` from a command line by the type of the field: `lr=1e-4`, `seeds=0..7`, `views=18,36`.

    Lists take commas and, for integers, ranges with both ends; `none` is the null of an optional field.

    Raises ParamError for a missing `=`, an unknown name or a value that does not parse.
    """
    hints = _hints(cls)
    name, value = _split(hints, text)
    return name, _parse(hints[name], value, name)


def parse_sweep(cls: type, text: str) -> tuple[str, list[Any]]:
    """Read `name=value,value` as several values of one field: `lr=1e-4,1e-3` gives two, `seeds=0..3` four seeds lists.

    For a list field each element becomes a list of one, so that `views=18,36` sweeps over single views.
    """
    hints = _hints(cls)
    name, value = _split(hints, text)
    annotation = _without_none(hints[name])
    if typing.get_origin(annotation) in (list, tuple):
        return name, [[element] for element in _parse(annotation, value, name)]
    numbers = _expand(value) if annotation is int else value.split(",")
    return name, [_parse(hints[name], item, name) for item in numbers]


def house() -> tuple[str, list[str]]:
    """The profile that plain `dvc repro` runs, and the slugs of the papers, from the root's `params.yaml`."""
    path = paths.root() / "params.yaml"
    content = _read(path)
    try:
        profile, papers = content["profile"], list(content["papers"])
    except (KeyError, TypeError) as error:
        raise ParamError(f"{path.name}: got {dict(content)}, expected `profile:` and a list `papers:`") from error
    return profile, papers


def dump(values: Mapping[str, Any], path: Path) -> None:
    """Write `values` as YAML 1.2."""
    from ruamel.yaml import YAML

    with path.open("w") as stream:
        YAML().dump(dict(values), stream)


def suggest(name: str, options: Iterable[str]) -> str:
    """` Did you mean 'views'?` for the nearest of `options`, or nothing."""
    near = difflib.get_close_matches(name, list(options), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _read(path: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML().load(path)  # the round-trip loader keeps line numbers
    except FileNotFoundError as error:
        raise ParamError(f"{paths.relative(path)} does not exist; expected the parameters there") from error
    except YAMLError as error:
        raise ParamError(f"{paths.relative(path)} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ParamError(f"{paths.relative(path)}: got {type(content).__name__}, expected a mapping")
    for name, block in content.items():
        if path.parent != paths.root() and not (block is None or isinstance(block, dict)):
            raise ParamError(f"{paths.relative(path)}: block {name!r} is {block!r}, expected a mapping of parameters")
    return content


def _hints(cls: type) -> dict[str, Any]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"the class of the parameters is {cls!r}; expected a dataclass")
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _checked(hints: dict[str, Any], name: str, value: Any, where: str) -> Any:
    if name not in hints:
        _refuse_name(hints, name, where)
    try:
        return _fit(hints[name], value)
    except TypeError as error:
        raise ParamError(
            f"{where}: parameter {name!r} is {_plain(value)!r} ({type(_plain(value)).__name__}), expected "
            f"{_describe(hints[name])}. {error}".rstrip()
        ) from error


def _refuse_name(hints: dict[str, Any], name: str, where: str) -> typing.NoReturn:
    raise ParamError(f"{where}: unknown parameter {name!r}; expected one of {', '.join(hints)}.{suggest(name, hints)}")


def _build(cls: type[T], values: dict[str, Any], where: str) -> T:
    missing = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ParamError(f"{where}: no value for {', '.join(missing)}; add it to the block `base`")
    try:
        return cls(**values)
    except ParamError:
        raise
    except ValueError as error:  # raised by the paper's own __post_init__
        raise ParamError(f"{where}: {error}") from error


def _fit(annotation: Any, value: Any) -> Any:
    """`value` as the annotation's type, or TypeError (whose text may name the element that does not fit)."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if any(value == option and type(_plain(value)) is type(option) for option in arguments):
            return _plain(value)
        near = suggest(str(value), [option for option in arguments if isinstance(option, str)])
        raise TypeError(near.strip())
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return None if option is type(None) and value is None else _fit(option, value)
            except TypeError:
                continue
        raise TypeError
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise TypeError
        return origin(_fit_elements(arguments[0], value))
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if annotation in (int, str, bool) and type(_plain(value)) is annotation:
        return _plain(value)
    raise TypeError


def _fit_elements(annotation: Any, values: Iterable[Any]) -> Iterable[Any]:
    for index, element in enumerate(values):
        try:
            yield _fit(annotation, element)
        except TypeError as error:
            raise TypeError(f"Element {index} is {element!r}.") from error


def _parse(annotation: Any, text: str, name: str) -> Any:
    origin = typing.get_origin(annotation)
    inner = _without_none(annotation)
    try:
        if inner is not annotation:
            return None if text.lower() in ("none", "null") else _parse(inner, text, name)
        if origin in (list, tuple):
            element = typing.get_args(annotation)[0]
            items = [] if text == "" else _expand(text) if element is int else text.split(",")
            return origin(_parse(element, item, name) for item in items)
        if origin is Literal:
            return _fit(annotation, next((o for o in typing.get_args(annotation) if str(o) == text), text))
        if annotation is bool:
            return {"true": True, "false": False}[text.lower()]
        if annotation in (int, float, str):
            return annotation(text)
    except ParamError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        hint = str(error) if isinstance(error, TypeError) else ""
        raise ParamError(f"{name}={text}: got {text!r}, expected {_describe(annotation)}. {hint}".rstrip()) from error
    raise ParamError(f"{name} has the type {annotation}, which a command line cannot set; set it in params.yaml")


def _split(hints: dict[str, Any], text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals:
        raise ParamError(f"got {text!r}, expected name=value, for example {next(iter(hints))}=...")
    if name not in hints:
        _refuse_name(hints, name, f"{name}={value}")
    return name, value


def _expand(text: str) -> list[str]:
    """`0..3,7` -> 0 1 2 3 7, still as text."""
    items: list[str] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        items += map(str, range(int(first), int(last) + 1)) if dots else [part]
    return items


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        if len(options) == 1:
            return options[0]
    return annotation


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin in (list, tuple):
        return f"a list of {_describe(arguments[0])}"
    return {int: "int", float: "float", str: "str", bool: "bool (true or false)", type(None): "null"}.get(
        annotation, str(annotation)
    )


def _line(path: Path, block: Any, name: str) -> str:
    return f"{paths.relative(path)}:{block.lc.key(name)[0] + 1}"


def _plain(value: Any) -> Any:
    """The loader's own subclasses of the plain types, as those."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
