"""The dashboard: the only module that imports mlflow.

MLflow shows runs; it is never the archive. Results live in git and DVC, and `mlflow.db` may be deleted. So a store that
cannot be reached costs one printed line and no run. Everything goes through the client API with explicit ids: no global
active run, and MLFLOW_RUN_ID is not looked at.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import paths, processes, provenance

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_BATCH = 900  # below MLflow's limits of 1000 metrics and 1 MB a request
_PARAM_LENGTH = 6000


class TrackingError(ValueError):
    """A tracking address that cannot work: what, got, expected, next step."""


def uri() -> str:
    """The tracking address: MLFLOW_TRACKING_URI, or the SQLite file `mlflow.db` at the repository's root.

    Raises TrackingError for a relative address, which would follow the working directory about, and for MLflow's
    retired folder store.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.root() / 'mlflow.db'}"
    advice = (
        f"unset MLFLOW_TRACKING_URI to use sqlite:///{paths.root() / 'mlflow.db'}, or give a server such as "
        "http://localhost:5000"
    )
    if address.startswith("sqlite"):
        path = re.sub(r"^sqlite(\+\w+)?://", "", address)
        if not re.match(r"^/(/|[A-Za-z]:)", path):
            raise TrackingError(
                f"MLFLOW_TRACKING_URI is {address!r}, a relative path that each working directory reads differently; "
                f"expected an absolute one (sqlite:// and four slashes in all). Next: {advice}"
            )
    elif address.startswith("file:") or ("://" not in address and address != "databricks"):
        raise TrackingError(
            f"MLFLOW_TRACKING_URI is {address!r}, a folder; MLflow 3 refuses its old folder store. Expected a database "
            f"or a server. Next: {advice}"
        )
    return address


def setup(slugs: list[str]) -> str:
    """Create the store and one experiment a paper, one after another, and close runs that died; say what is there.

    Safe to call from several processes at once. Raises TrackingError for a bad address, and whatever MLflow raises when
    the store cannot be reached.
    """
    with _locked_store():
        client = _client()
        experiments = [_experiment(client, slug) for slug in slugs]
        dead = _close_dead_runs(client, experiments)
    closed = f", {dead} run(s) of killed drivers marked KILLED" if dead else ""
    return f"tracking store {_shown(uri())}: {len(slugs)} experiment(s){closed}"


class Run:
    """One tracked run, from `start` to `finish`. When the store fails, it says so once and does nothing from then on.

    `id` is MLflow's run id, "" when the run is not tracked.
    """

    def __init__(self, slug: str, profile: str, tags: Mapping[str, str]):
        self.slug, self.profile = slug, profile
        self.id = self.experiment = ""
        self._client: MlflowClient | None = None
        self._tags = {**processes.identity(), "paper": slug, "profile": profile, **tags}

    def start(self, params: Mapping[str, Any]) -> None:
        """Create the run, with its tags and parameters."""

        def create() -> None:
            with _locked_store():
                client = _client()
                self.experiment = _experiment(client, self.slug)
                _close_dead_runs(client, [self.experiment])
            origin = provenance.git()
            tags = {
                "git_commit": origin["commit"],
                "git_dirty": str(origin["dirty"]),
                "lock_sha256": provenance.environment()["lock_sha256"],
                "mlflow.source.name": paths.relative(paths.notebook(self.slug)),
                "mlflow.source.git.commit": origin["commit"],
                **self._tags,
            }
            name = f"{self.slug}/{self.profile}/{origin['commit'][:7] or 'no-git'}"
            run = client.create_run(self.experiment, tags=tags, run_name=name)
            self._client, self.id = client, run.info.run_id
            _log_params(client, self.id, params)

        try:
            create()
        except TrackingError:
            raise
        except Exception as error:
            self._give_up("this run", error)

    def sample(self, pid: int) -> None:
        """Log what the machine and the process tree under `pid` use, and the heartbeat. Failures are skipped."""
        if self._client:
            with contextlib.suppress(Exception):  # the next sample may succeed; the final log says so if it does not
                _log_metrics(
                    self._client, self.id, {name: [(0, value)] for name, value in processes.usage(pid).items()}
                )
                self._client.set_tag(self.id, processes.HEARTBEAT, str(int(time.time())))

    def log(self, folder: Path) -> None:
        """Log a finished run's folder: metrics, curves by step, tags of its provenance, figures, notebook."""
        if self._client:
            client = self._client
            self._guarded("its results", lambda: _log_folder(client, self, folder))

    def attach(self, *files: Path, note: str = "") -> None:
        """Attach what a failed run left, and the reason as the run's description."""
        if self._client:
            client = self._client

            def send() -> None:
                for path in files:
                    if path.is_file():
                        client.log_artifact(self.id, str(path))
                if note:
                    client.set_tag(self.id, "mlflow.note.content", note[:5000])

            self._guarded("what the failed run left", send)

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        if self._client:
            client = self._client
            self._guarded(f"its end ({status})", lambda: client.set_terminated(self.id, status))
            self._client = None

    @property
    def link(self) -> str:
        """Where to see the run; "" when it is not tracked."""
        if not self.id:
            return ""
        server = uri().rstrip("/") if uri().startswith("http") else "make ui:"
        return f"{server}{'/' if server != 'make ui:' else ' '}#/experiments/{self.experiment}/runs/{self.id}"

    def _guarded(self, what: str, action: Callable[[], None]) -> None:
        for attempt in (1, 2, 3):
            try:
                return action()
            except Exception as error:
                if attempt == 3 or "database is locked" not in str(error):
                    return self._give_up(what, error)
                time.sleep(2 * attempt)  # another run is writing to the same SQLite file

    def _give_up(self, what: str, error: Exception) -> None:
        self._client = None
        print(
            f"resparse: MLflow did not get {what} (at {_shown(_uri_or_empty())}: {reason(error)}); the run goes on and "
            f"its results are written. To log them later: python -m pipelines.run {self.slug} --profile {self.profile} "
            "--relog",
            file=sys.stderr,
        )


def log_interactive(slug: str, profile: str, folder: Path) -> str:
    """Log a notebook run by hand, tagged `interactive`; the sentence to show below it."""
    return log_folder(slug, profile, folder, {"interactive": "true"})


def log_folder(slug: str, profile: str, folder: Path, tags: Mapping[str, str]) -> str:
    """Log a finished run's folder as a new run; the sentence that says where it is, or that it is not tracked."""
    run = Run(slug, profile, tags)
    run.start(json.loads((folder / "metrics.json").read_text())["params"])
    run.log(folder)
    run.finish("FINISHED")
    return f"resparse: tracked, see {run.link}" if run.id else "resparse: not tracked"


def reason(error: Exception) -> str:
    """The first line of what MLflow or the way to it says, without passwords."""
    return _shown((str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def clean(name: str) -> str:
    """`name` with the characters that MLflow refuses in metric names replaced: `psnr@(18)` -> `psnr_at_18`."""
    words = name.replace("@", "_at_").replace("%", "_percent").replace("[", "/").replace("]", "")
    return re.sub(r"[^\w./: -]+", "_", words, flags=re.ASCII).strip("_ /.").replace("//", "/")[:240] or "unnamed"


def _client() -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a run needs no network
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # we say ourselves that a server is down
    return MlflowClient(tracking_uri=uri())


@contextlib.contextmanager
def _locked_store() -> Iterator[None]:
    """One process at a time may create or migrate a SQLite store; several at once break it."""
    if not uri().startswith("sqlite"):
        yield
        return
    import fcntl

    lock = Path(f"{_database()}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _database() -> Path:
    return Path(re.sub(r"^sqlite(\+\w+)?:///", "", uri()).split("?")[0])


def _experiment(client: MlflowClient, slug: str) -> str:
    """The id of the paper's experiment, made or brought back if need be."""
    found = client.get_experiment_by_name(slug)
    if found is None:
        # databases store artifact folders as they are given; a server has its own place for them
        local = not uri().startswith(("http", "databricks"))
        home = (_database().parent if uri().startswith("sqlite") else paths.root()) / "mlartifacts" / slug
        try:
            return client.create_experiment(slug, artifact_location=home.as_uri() if local else None)
        except Exception:  # somebody else created it in between
            found = client.get_experiment_by_name(slug)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _close_dead_runs(client: MlflowClient, experiments: list[str]) -> int:
    """Mark RUNNING runs of this host as KILLED when their driver is gone; a killed driver cannot do it itself."""
    if not experiments:
        return 0
    query = f"attributes.status = 'RUNNING' and tags.`{processes.HOST}` = '{processes.identity()[processes.HOST]}'"
    dead = [run for run in client.search_runs(experiments, query) if processes.is_dead(run.data.tags)]
    for run in dead:
        client.set_terminated(run.info.run_id, "KILLED")
    return len(dead)


def _log_params(client: MlflowClient, run: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    shown = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in params.items()]
    entities = [Param(clean(k), v if len(v) <= _PARAM_LENGTH else v[: _PARAM_LENGTH - 1] + "…") for k, v in shown]
    for start in range(0, len(entities), 100):
        client.log_batch(run, params=entities[start : start + 100])


def _log_metrics(client: MlflowClient, run: str, series: Mapping[str, list[tuple[int, float]]]) -> None:
    """Log named series of (step, value)."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    taken: dict[str, str] = {}
    entities = []
    for name, points in series.items():
        key = clean(name)
        while taken.setdefault(key, name) != name:  # two names that MLflow's characters make one
            key += "_"
        entities += [Metric(key, value, now, step) for step, value in points]
    for start in range(0, len(entities), _BATCH):
        client.log_batch(run, metrics=entities[start : start + _BATCH])


def _log_folder(client: MlflowClient, run: Run, folder: Path) -> None:
    content = json.loads((folder / "metrics.json").read_text())
    origin = json.loads((folder / "provenance.json").read_text())
    curves = json.loads((folder / "curves.json").read_text())
    for name, value in _provenance_tags(origin).items():
        client.set_tag(run.id, name, value[:_PARAM_LENGTH])
    by_seed = _series(content["metrics"], curves)
    means = _means(content["metrics"])
    _log_metrics(client, run.id, {**by_seed.pop("all", {}), **means})
    for seed, series in sorted(by_seed.items(), key=lambda item: int(item[0])):
        tags = {
            **processes.identity(),
            "mlflow.parentRunId": run.id,
            "seed": seed,
            "paper": run.slug,
            "profile": run.profile,
        }
        child = client.create_run(run.experiment, tags=tags, run_name=f"seed {seed}").info.run_id
        _log_params(client, child, {**content["params"], "seed": int(seed)})
        _log_metrics(client, child, series)
        client.set_terminated(child, "FINISHED")
    for name in ("metrics.json", "provenance.json", "curves.json", "resolved.yaml", "notebook.html"):
        if (folder / name).is_file():
            client.log_artifact(run.id, str(folder / name))
    if (folder / "figures").is_dir():
        client.log_artifacts(run.id, str(folder / "figures"), "figures")


def _series(metrics: Mapping[str, Any], curves: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """seed or "all" -> name -> points, of single values (at step 0) and curves."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, variants in metrics.items():
        for variant, row in variants.items():
            for seed, value in row.items():
                found.setdefault(seed, {})[_full(name, variant)] = [(0, _float(value))]
    for name, variants in curves.items():
        for variant, row in variants.items():
            for seed, curve in row.items():
                steps = curve["steps"]
                if any(step != int(step) for step in steps):
                    steps = range(len(steps))  # MLflow counts steps in whole numbers
                points = [(int(step), _float(value)) for step, value in zip(steps, curve["values"], strict=True)]
                found.setdefault(seed, {})[f"curves/{_full(name, variant)}"] = points
    return found


def _means(metrics: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The mean over seeds, for the parent run."""
    return {
        _full(name, variant): [(0, sum(map(_float, row.values())) / len(row))]
        for name, variants in metrics.items()
        for variant, row in variants.items()
        if row and "all" not in row
    }


def _provenance_tags(origin: Mapping[str, Any]) -> dict[str, str]:
    machine, kernels = origin["machine"], origin["kernels"]
    tags = {f"data.{clean(name)}": json.dumps(value).strip('"') for name, value in origin["data"].items()}
    return {
        **tags,
        "device": origin["device"],
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB",
        "gpus": ", ".join(machine["gpus"]),
        "kernel_stamp": str(kernels.get("stamp", "")),
        "params_digest": origin["params_digest"],
        "sources_digest": origin["sources_digest"],
        "measured": origin["finished"],
    }


def _full(name: str, variant: str) -> str:
    return f"{name}/{variant}" if variant else name


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _uri_or_empty() -> str:
    try:
        return uri()
    except TrackingError:
        return os.environ.get("MLFLOW_TRACKING_URI", "")


def _shown(text: str) -> str:
    """A text without the user names and passwords of the addresses in it."""
    return re.sub(r"//[^@/\s]*@", "//", text)
