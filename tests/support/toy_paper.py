"""A complete small house with one paper that really runs, in a temporary folder; nothing of it lies under papers/.

The code is the repository's own, through links; papers, parameters and results are the house's. `fault` makes the paper
misbehave in the ways a real one might; with no seeds it needs neither torch nor time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = """
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Params:
    seeds: list[int]
    dataset: str
    rate: float
    fault: Literal["none", "raise", "kill", "crash", "silent", "hang"]
"""

PARAMS = """
base: {seeds: [0, 1], dataset: made, rate: 1e-4, fault: none}
smoke: {}
laptop: {rate: 0.5}
paper: {rate: 1}
"""

METHOD = """
def double(x):
    return 2 * x
"""

NOTEBOOK = """
# %% [markdown]
# # A toy paper
# It doubles: $y = 2 x$.

# %% tags=["parameters"]
profile = "smoke"
seeds = None
dataset = None
rate = None
fault = None

# %%
import ctypes, os, signal, time
from common import params as parameters
from common.record import Record
from papers.toy.method import double
from papers.toy.settings import Params

given = {"seeds": seeds, "dataset": dataset, "rate": rate, "fault": fault}
params = parameters.load(Params, "toy", profile, given)
record = Record.open("toy", profile, params)
record.data("made", sha256="0" * 64)
record.metric("begun", 1)

# %% [markdown]
# ## Doubling

# %%
def work(seed):
    with open("worked.txt", "a") as stream:
        stream.write(f"{seed}\\n")
    return double(seed + params.rate)

for seed in record.progress(params.seeds, "doubling"):
    record.metric("doubled", record.cell(f"seed{seed}", lambda: work(seed)), variant="all in", seed=seed)
    record.curve("loss", [0, 1, 2], [3.0, 2.0, seed], seed=seed)

# %% [markdown]
# ## Trouble

# %%
if params.fault == "raise":
    raise ZeroDivisionError("on purpose")
if params.fault == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if params.fault == "crash":
    ctypes.string_at(0)
if params.fault == "hang":
    record.say("hanging")
    time.sleep(300)

# %%
if params.fault != "silent":
    import matplotlib.pyplot as plt

    record.metric("factor", 2)
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 2])
    record.figure("line", figure, "Twice as much.")
    record.close()
"""

CLAIMS = """
- {id: doubles, text: It doubles., source: ours, kind: invariant, metric: factor, expect: "= 2", seeds: 0,
   needs: {profile: smoke}}
"""

PAPER = "{title: A toy paper, authors: Nobody, summary: It doubles., year: 2026}\n"

# an editable installation of the repository must not answer for this house's code
SITE = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""


def build(root: Path) -> Path:
    """Make the house in `root`, which must not exist."""
    (root / "papers" / "toy").mkdir(parents=True)
    for name in ("common", "kernels", "pipelines", "requirements.lock", "dvc.yaml"):
        (root / name).symlink_to(ROOT / name)
    content = {
        "sitecustomize.py": SITE,
        "params.yaml": "profile: smoke\npapers: [toy]\n",
        "papers/__init__.py": "",
        "papers/toy/__init__.py": "",
        "papers/toy/settings.py": SETTINGS.lstrip(),
        "papers/toy/method.py": METHOD.lstrip(),
        "papers/toy/toy.py": NOTEBOOK.lstrip(),
        "papers/toy/params.yaml": PARAMS.lstrip(),
        "papers/toy/claims.yaml": CLAIMS.lstrip(),
        "papers/toy/paper.yaml": PAPER,
    }
    for name, text in content.items():
        (root / name).write_text(text)
    return root


def environment(root: Path, **more: str) -> dict[str, str]:
    """The environment of a command in the house: its code, its tracking store, one thread."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RESPARSE_", "MLFLOW_", "PYTEST_"))}
    return {**inherited, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


def run(root: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` in the house, waited for."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=environment(root, **more),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def start(root: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """`python -m ...` in the house, left running; it hears Ctrl-C even where the tests run in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=environment(root, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
