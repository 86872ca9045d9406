"""What one execution measured.

A notebook opens one `Record`, reports to it while it computes, and closes it. Every value is on disk as soon as it is
reported, so a killed kernel loses nothing it had measured.

    record = Record.open("gloredi", profile, params)
    record.metric("psnr", 34.2, variant="gloredi", seed=0)
    record.close()                                          # metrics.json: the proof that the run succeeded
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import files, paths, provenance
from common import params as parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN_DIR = "RESPARSE_RUN_DIR"  # set by the driver: the folder of the run
HEARTBEAT = "progress.json"
MAX_FIGURE_WIDTH = 1600  # pixels
T = TypeVar("T")


class RecordError(ValueError):
    """Something that cannot be recorded: what, got, expected, next step."""


class Record:
    """The measurements of one execution of one paper; `folder` holds its files.

    Use `Record.open`. `interactive` is true when a person runs the notebook and no driver does: then everything goes to
    `results/scratch/<slug>/<profile>` and never feeds the board.
    """

    def __init__(self, slug: str, profile: str, params: Any, folder: Path, *, interactive: bool):
        self.slug, self.profile, self.folder, self.interactive = slug, profile, folder, interactive
        self.params = parameters.resolved(params)
        self._metrics: dict[str, dict[str, dict[str, float]]] = {}
        self._curves: dict[str, dict[str, dict[str, dict[str, list[float]]]]] = {}
        self._figures: dict[str, str] = {}
        self._data: dict[str, Any] = {}
        self._cells = {"computed": 0, "restored": 0, "seconds": 0.0}
        self._unwritten: list[str] = []
        self._clock = provenance.Clock()
        self._beat = 0.0
        self._digest = ""
        self._closed = False

    @classmethod
    def open(cls, slug: str, profile: str, params: Any) -> Record:
        """Begin a record in the driver's run folder, or in the scratch folder when there is no driver.

        slug: the paper's folder name; profile: smoke, laptop or paper; params: an instance of the paper's dataclass.

        Raises RecordError when the driver's run already has a record, OSError when the folder cannot be written.
        """
        folder = os.environ.get(RUN_DIR)
        record = cls(
            slug, profile, params, Path(folder) if folder else paths.scratch(slug, profile), interactive=not folder
        )
        if folder and (record.folder / "record.jsonl").exists():
            raise RecordError(
                f"the run of {slug} already has a record in {paths.relative(record.folder)}; expected one "
                "Record.open a notebook; use the first one"
            )
        _keep_previous(record.folder)
        (record.folder / "figures").mkdir(parents=True)
        files.write(record.folder / "record.jsonl", "")
        record.say("started")
        return record

    def metric(self, name: str, value: Any, *, variant: str = "", seed: int | None = None) -> None:
        """Report one number; claims address it as `name[variant]`.

        value: anything that is one real number (Python, NumPy, a torch scalar; a bool is 0 or 1). NaN and infinities
            are recorded as what they are: `null` in metrics.json, listed under `not_finite`; no claim can hold on one.
        seed: the seed it belongs to; None for a number that is the same for every seed.

        Raises RecordError for a value that is no number, a bad name, or a second value for (name, variant, seed).
        """
        number, column = _number(name, value), self._address(name, variant, seed)
        row = self._metrics.setdefault(name, {}).setdefault(variant, {})
        if column in row:
            raise RecordError(
                f"metric {_address(name, variant, column)} is already recorded: got {number}, had {row[column]}; "
                "expected one value each; give another variant or seed, or record the final value once"
            )
        if row and ("all" in row) != (column == "all"):
            raise RecordError(
                f"metric {_address(name, variant, column)} comes both with and without a seed (had "
                f"{', '.join(row)}); expected a seed every time or never"
            )
        row[column] = number
        self._append({"metric": name, "variant": variant, "seed": column, **_json_number(number)})
        if not math.isfinite(number):
            print(f"resparse: metric {_address(name, variant, column)} is {number}", file=sys.stderr)

    def curve(
        self, name: str, steps: Sequence[float], values: Sequence[Any], *, variant: str = "", seed: int | None = None
    ) -> None:
        """Report one curve, for example a training loss: `values[i]` at `steps[i]`.

        Raises RecordError for lengths that differ, values that are no numbers, or a curve reported before.
        """
        column = self._address(name, variant, seed)
        if len(steps) != len(values):
            raise RecordError(
                f"curve {_address(name, variant, column)}: got {len(steps)} steps and {len(values)} values, expected "
                "as many of each"
            )
        row = self._curves.setdefault(name, {}).setdefault(variant, {})
        if column in row:
            raise RecordError(
                f"curve {_address(name, variant, column)} is already recorded; expected one each; give another variant "
                "or seed, or record the whole curve once"
            )
        numbers_ = [_json_number(_number(name, value))["value"] for value in values]
        row[column] = {"steps": [_number(name, step) for step in steps], "values": numbers_}
        self._append({"curve": name, "variant": variant, "seed": column, **row[column]})

    def figure(self, name: str, fig: Figure, caption: str) -> None:
        """Keep a matplotlib figure as PNG (at most 1600 pixels wide), show it in the notebook, and close it.

        name: lower-case words joined by `-` or `_`, the file's name; caption: one or two sentences that also serve
            readers who cannot see the picture.

        Raises RecordError for a bad or repeated name or an empty caption.
        """
        self._require_open()
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise RecordError(f"figure name {name!r}: expected lower-case letters, digits, '-' and '_'")
        if name in self._figures:
            raise RecordError(f"figure {name!r} is already recorded; expected another name")
        if not caption.strip():
            raise RecordError(f"figure {name!r} has no caption; expected a sentence saying what it shows")
        path = self.folder / "figures" / f"{name}.png"
        dpi = min(150.0, MAX_FIGURE_WIDTH / fig.get_figwidth())
        # matplotlib would write its version into the file, which then differs without a visible difference
        files.write(path, lambda stream: fig.savefig(stream, format="png", dpi=dpi, metadata={"Software": None}))
        self._figures[name] = caption.strip()
        self._append({"figure": name, "caption": caption.strip()})
        _show(path, fig, caption.strip())

    def data(self, name: str, *, sha256: str | Mapping[str, str]) -> None:
        """Note a data set that was used: its registered name, and its hash (or one a file).

        Raises RecordError when the same name comes with another hash.
        """
        self._require_open()
        value = sha256 if isinstance(sha256, str) else dict(sha256)
        if self._data.setdefault(name, value) != value:
            raise RecordError(f"data {name!r}: got sha256 {value}, had {self._data[name]}; expected one content a run")
        self._append({"data": name, "sha256": value})

    def cell(self, key: str, fn: Callable[[], T]) -> T:
        """The result of `fn()`, computed once: a run that was killed and started again finds it on disk.

        key: names the unit of work within the paper, for example `gloredi-18-seed0`. The result is kept for as long as
            parameters (apart from `seeds`, so that more seeds may join), sources, kernels and the code of `fn` stay
            the same.
        fn: a function without arguments; it starts from random states of its own, derived from `key`, so that a
            restored cell does not shift the cells after it. Its result must be picklable.

        A full disk or an unwritable folder costs a warning and the chance to resume, never the result.
        """
        self._require_open()
        from common import cells

        store = cells.Store(self.slug, self.cells_digest())
        result, seconds, restored = store.get(key, fn, tell=self.say)
        return self._count("restored" if restored else "computed", result, seconds)

    def cells(
        self, jobs: Mapping[str, Callable[[], T]], desc: str = "cells", *, workers: int | None = None
    ) -> dict[str, T]:
        """Many independent cells: the result of every `fn()` by its key, in the order of `jobs`.

        jobs: key and fn as for `cell`; for several workers fn must be picklable, a module's function or a
            functools.partial of one.
        workers: how many are computed at once, each in a process of its own with one thread (small networks gain
            nothing from more); None: as many as torch has threads here; 1: one after another in this process, for a
            GPU or when a person wants to look on.

        The first one that fails ends it with its error; finished ones are kept. Raises RecordError for less than one
        worker, cells.WorkerDied for a process that was killed.
        """
        self._require_open()
        import torch

        from common import cells

        workers = torch.get_num_threads() if workers is None else workers
        if workers < 1:
            raise RecordError(f"workers: got {workers}, expected at least 1, or None for one a core")
        if workers == 1:
            return {key: self.cell(key, fn) for key, fn in jobs.items()}
        store = cells.Store(self.slug, self.cells_digest())
        stored = {key: store.find(key, fn) for key, fn in jobs.items()}
        found = {key: self._count("restored", kept["result"], kept["seconds"]) for key, kept in stored.items() if kept}
        missing = {key: fn for key, fn in jobs.items() if key not in found}
        if missing:
            at_once = store.compute_at_once(
                missing, min(workers, len(missing)), beat=lambda: self.say(f"{desc}: {len(found)}/{len(jobs)}")
            )
            for key, result, seconds in self.progress(at_once, desc, total=len(missing)):
                found[key] = self._count("computed", result, seconds)
        return {key: found[key] for key in jobs}

    def _count(self, how: str, result: T, seconds: float) -> T:
        self._cells[how] += 1
        self._cells["seconds"] = round(self._cells["seconds"] + seconds, 1)
        return result

    def cells_digest(self) -> str:
        """What a stored cell depends on: parameters without `seeds`, sources, the built kernels."""
        if not self._digest:
            settled = {name: value for name, value in self.params.items() if name != "seeds"}
            kernel = str(provenance.kernel_info().get("stamp", ""))
            self._digest = files.digest(
                [self.profile, json.dumps(settled, sort_keys=True), provenance.sources_digest(self.slug), kernel]
            )
        return self._digest

    def progress(self, iterable: Iterable[T], desc: str, *, total: int | None = None) -> Progress[T]:
        """One plain bar over `iterable`, which also keeps the run's heartbeat going.

        bar = record.progress(range(steps), "training")
        for step in bar: ...; bar.set_postfix(loss=loss)
        """
        return Progress(self, iterable, desc, total)

    def say(self, message: str) -> None:
        """Write the heartbeat: the time and what is being done."""
        self._beat = time.time()
        # the heartbeat serves watchers; a disk that is full must not stop the measurement
        with contextlib.suppress(OSError):
            files.write_json(self.folder / HEARTBEAT, {"time": self._beat, "message": message})

    def close(self) -> None:
        """Write metrics.json and provenance.json; nothing can be reported afterwards.

        In a notebook run by hand it also shows the claims of the paper as a table and logs one interactive run.

        Raises RecordError when no metric was recorded or the record is closed already, OSError when the disk is full.
        """
        self._require_open()
        if not self._metrics:
            raise RecordError(f"the record of {self.slug} holds no metric; expected at least one record.metric(...)")
        if self._unwritten:
            with (self.folder / "record.jsonl").open("a") as stream:
                stream.writelines(self._unwritten)
        origin = provenance.collect(self.slug, self.profile, self.params, self._data, self._clock)
        origin["cells"] = self._cells
        origin["interactive"] = self.interactive
        files.write_json(self.folder / "curves.json", self._curves)
        files.write_json(self.folder / "figures" / "figures.json", self._figures)
        files.write_json(self.folder / "provenance.json", origin)
        metrics = self._metrics_json()
        files.write_json(self.folder / "metrics.json", metrics)  # last: it is the proof that all the rest is there
        self._closed = True
        self.say("finished")
        if self.interactive:
            from common import interactive

            interactive.show_claims(self.slug, self.profile, metrics["metrics"], origin)
            interactive.track(self.slug, self.profile, self.folder)

    def _metrics_json(self) -> dict[str, Any]:
        not_finite: dict[str, str] = {}
        values: dict[str, dict[str, dict[str, float | None]]] = {}
        for name, variants in self._metrics.items():
            for variant, row in variants.items():
                for column, number in row.items():
                    finite = math.isfinite(number)
                    values.setdefault(name, {}).setdefault(variant, {})[column] = number if finite else None
                    if not finite:
                        not_finite[_address(name, variant, column)] = str(number)
        content = {"paper": self.slug, "profile": self.profile, "params": self.params, "metrics": values}
        return {**content, "not_finite": not_finite} if not_finite else content

    def _address(self, name: str, variant: str, seed: int | None) -> str:
        """Check the address of a value; the column it goes into."""
        self._require_open()
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise RecordError(
                f"name {name!r}: expected letters, digits and '_', as claims can address; try variant=..."
            )
        if not isinstance(variant, str) or re.search(r"[\[\]\n]", variant) or variant != variant.strip():
            raise RecordError(f"{name}: variant {variant!r}: expected a text without brackets or spaces at its ends")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
            raise RecordError(f"{name}: seed {seed!r}: expected an int, or None for a value that no seed changes")
        return "all" if seed is None else str(int(seed))

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **entry}) + "\n"
        try:
            with (self.folder / "record.jsonl").open("a") as stream:
                stream.write(line)
        except OSError as error:
            if not self._unwritten:
                print(
                    f"resparse: cannot write {paths.relative(self.folder)}/record.jsonl ({error.strerror}); values "
                    "stay in memory until record.close(). Make room before the notebook ends",
                    file=sys.stderr,
                )
            self._unwritten.append(line)

    def _require_open(self) -> None:
        if self._closed:
            raise RecordError(f"the record of {self.slug} is closed; expected everything to be reported before close()")


class Progress(Iterable[T]):
    """An iterable with a plain tqdm bar that beats the record's heart. Iterate it once; see `Record.progress`."""

    def __init__(self, record: Record, iterable: Iterable[T], desc: str, total: int | None):
        from tqdm import tqdm

        self._record = record
        # a driven notebook keeps each refresh in its output, so there the bar moves less often
        interval = 0.5 if record.interactive else 10.0
        # on standard output, because notebooks show the other one as an alarm
        self._bar = tqdm(iterable, desc=desc, total=total, ascii=True, mininterval=interval, file=sys.stdout)

    def __iter__(self) -> Iterator[T]:
        try:
            for done, item in enumerate(self._bar, start=1):
                yield item
                self._pulse(done)
        finally:
            self._bar.close()

    def set_postfix(self, **values: Any) -> None:
        """Show numbers behind the bar: `bar.set_postfix(loss=0.12)`."""
        self._bar.set_postfix({name: _short(value) for name, value in values.items()}, refresh=False)

    def _pulse(self, done: int) -> None:
        if time.time() - self._record._beat >= 1.0:
            bar = self._bar
            of = f"/{bar.total}" if bar.total else ""
            self._record.say(f"{bar.desc}: {done}{of} {bar.postfix or ''}".rstrip())


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) and hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    if isinstance(value, numbers.Real):
        return float(value)
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise RecordError(
        f"{name}: got {type(value).__name__}{shape} {str(value)[:60]!r}, expected one real number; reduce it first, "
        "for example with .mean()"
    )


def _keep_previous(folder: Path) -> None:
    """A notebook run again by hand starts anew; what the last one reported stays until the one after."""
    if (folder / "record.jsonl").exists():
        os.replace(folder / "record.jsonl", folder / "record.previous.jsonl")
    shutil.rmtree(folder / "figures", ignore_errors=True)


def _json_number(number: float) -> dict[str, Any]:
    """A number as JSON can hold it: NaN and infinities become null with their name beside it."""
    return {"value": number} if math.isfinite(number) else {"value": None, "not_finite": str(number)}


def _address(name: str, variant: str, column: str) -> str:
    return f"{name}{f'[{variant}]' if variant else ''}{'' if column == 'all' else f' (seed {column})'}"


def _short(value: Any) -> Any:
    return f"{float(value):.4g}" if isinstance(value, float) or hasattr(value, "item") else value


def _show(path: Path, fig: Figure, caption: str) -> None:
    """The saved picture itself, so that notebook and board show the same one."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    if shell:
        from IPython.display import Image, Markdown, display

        display(Image(data=path.read_bytes(), alt=caption), Markdown(f"*{caption}*"))
    if plt := sys.modules.get("matplotlib.pyplot"):
        plt.close(fig)
