"""The `resparse` command. Every command is a thin door to a module that can be used without it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from pipelines import finetune, scene, sparsify

# Other imports of ours stand inside the commands: `resparse --help` must not wait for torch.

OURS = {"common", "kernels", "papers", "pipelines"}


@dataclass
class _Settings:
    debug: bool = False


_settings = _Settings()
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Data sets: what is known, what is here, where it lies.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(scene.app, name="scene")
app.command("sparsify")(sparsify.sparsify)
app.command("finetune")(finetune.finetune)

Slug = Annotated[str, typer.Argument(help="the paper's folder under papers/, for instance gloredi")]
DataName = Annotated[str, typer.Argument(metavar="NAME", help="a registered name, see `resparse data list`")]
Profile = Annotated[str, typer.Option("--profile", "-p", help="smoke, laptop or paper; default: that of params.yaml")]


def main() -> None:
    """Entry point: mistakes and failures are one line, `resparse --debug ...` shows where they come from."""
    try:
        app()
    except Exception as error:
        if _settings.debug or not _is_for_users(error):
            raise
        print(f"resparse: {error}", file=sys.stderr)
        sys.exit(1)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error (before the command)")] = False,
) -> None:
    """Papers on sparsity, re-measured: run them, sweep them, read the verdicts."""
    _settings.debug = debug


@app.command()
def run(
    slug: Slug,
    profile: Profile = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="change a parameter; makes it a trial")
    ] = None,
    relog: Annotated[bool, typer.Option("--relog", help="log the finished run to MLflow again, do not run")] = False,
) -> None:
    """Run one paper's notebook and publish its results.

    [dim]resparse run gloredi --profile laptop
    resparse run gloredi --set steps=200 --set views=18,36[/dim]

    With --set it is a trial: tracked and kept under results/scratch, never official.
    """
    from common import params
    from pipelines import run as driver

    params.settings(slug)
    chosen = profile or params.house()[0]
    if relog and set_:
        raise typer.BadParameter("--relog logs the official run, which has no --set; leave one of them out")
    raise typer.Exit(driver.relog(slug, chosen) if relog else driver.run(slug, chosen, set_ or []))


@app.command()
def board(
    diff: Annotated[str, typer.Option(metavar="REV", help="show the verdicts that differ from this commit's")] = "",
) -> None:
    """Judge every claim, write the scoreboard and print it.

    [dim]resparse board --diff HEAD~1[/dim]
    """
    from pipelines import board as judge

    raise typer.Exit(judge.show(table=True, diff=diff))


@app.command()
def batch(
    slug: Slug,
    profile: Profile = "",
    seeds: Annotated[str, typer.Option(help="0..7 or 0,3; default: the profile's own")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=V,V", help="a parameter and the values it takes in turn")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="cells at once; default: half the cores")] = 0,
    name: Annotated[str, typer.Option(help="folder under results/batch/<slug>; default: the profile")] = "",
    show: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="print only this metric; may be given again")
    ] = None,
) -> None:
    """Run a paper's notebook for many seeds and values, a few at a time.

    [dim]resparse batch gloredi --profile smoke --seeds 0..7 --set views=18,36[/dim]

    Each value of --set is crossed with each other one and with each seed; a list parameter takes one value at a time.
    Finished cells are kept: the same command again goes on where it stopped, and tries failed cells again. Use
    [bold]--jobs 1[/bold] where cells share one GPU or where times are compared.

    One single run with plain papermill instead: numbers and words by -p, lists by -y.

    [dim]papermill papers/gloredi/gloredi.ipynb out.ipynb -k python3 -p profile smoke -p learning_rate 1e-3
    -y 'seeds: \\[0, 1]'[/dim]
    """
    from common import params, paths
    from pipelines import batch as batches
    from pipelines import batch_report
    from pipelines.executors.local import LocalExecutor, cores

    params.settings(slug)
    planned = batches.plan(slug, profile or params.house()[0], seeds=seeds, sweeps=set_ or [], name=name)
    command = f"resparse {shlex.join(sys.argv[1:])}"
    executor = LocalExecutor(min(jobs or max(1, cores() // 2), len(planned.cells)))
    try:
        ran = _with_bar(planned, executor)
    except batches.Interrupted:
        done = sum(planned.is_done(cell) for cell in planned.cells)
        print(f"resparse: stopped with {done} of {len(planned.cells)} cells done, which are kept. To go on: {command}")
        raise typer.Exit(130) from None
    batches.log(planned, ran)
    summary, table = batch_report.write(planned, command)
    from rich.console import Console

    batch_report.print_table(planned, Console(), show=show or [])
    failed = sum(not planned.is_done(cell) for cell in planned.cells)
    print(f"cells: {len(planned.cells) - failed} done, {failed} failed; {paths.relative(table)}, {summary.name}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def new(
    slug: Annotated[str, typer.Argument(help="lower-case letters, digits and '_': the paper's folder and package")],
    title: Annotated[str, typer.Option(help="the paper's title")] = "",
    arxiv: Annotated[str, typer.Option(help="its number, such as 2308.08463")] = "",
) -> None:
    """Make the folder of a new paper: a stub that runs, and that the board refuses until it has a claim.

    [dim]resparse new my_paper --title "Sparse is enough" --arxiv 2308.08463[/dim]
    """
    from common import paths
    from pipelines import new_paper

    for path in new_paper.create(slug, title or slug.replace("_", " ").capitalize(), arxiv):
        print(f"  {paths.relative(path)}")
    print(f"Next: write papers/{slug}/method.py, tell it in {slug}.py, keep the pair with")
    print(f"  jupytext --sync papers/{slug}/{slug}.py")
    print("then state its claims in claims.yaml, their sabotages in the test, and remove `stub: true` from paper.yaml.")
    print(f"Try it: resparse run {slug} --profile smoke; the rules: pytest tests/contract -k {slug}")


@app.command()
def bench(
    op: Annotated[str, typer.Argument(help="one kernel, for instance ct; default: all")] = "",
) -> None:
    """Time the kernels against the peers and write results/bench.json; leave the machine alone meanwhile."""
    from common import paths

    # a process of its own: nothing that this one has imported or started takes part in the timing
    raise typer.Exit(subprocess.call([sys.executable, "-m", "kernels.bench", *([op] if op else [])], cwd=paths.root()))


@data_app.command("list")
def data_list(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="show all about this one")] = "",
) -> None:
    """Show the data sets that are known and which are here; of one also licence, source, citation and hashes."""
    from common import data
    from pipelines.info import presence

    if name:
        print(data.describe(name))
        print("\n".join(f"  {file.sha256}  {file.path}" for file in data.registry()[name].files))
        return
    for known, entry in data.registry().items():
        print(f"{known:<24} {entry.bytes / 1e6:6.1f} MB  {presence(known):<7}  {entry.title}")


@data_app.command("fetch")
def data_fetch(name: DataName) -> None:
    """Download a data set into the cache, checked by its hashes; goes on where a broken download stopped."""
    from common import data

    print(data.describe(name))
    print(data.fetch(name))


@data_app.command("path")
def data_path(name: DataName) -> None:
    """Print the folder of a data set that is here, for use in scripts."""
    from common import data

    data.describe(name)  # an unknown name is another mistake than a missing folder
    folder = data.locate(name)
    if folder is None:
        print(f"resparse: {name} is not on this machine; next: resparse data fetch {name}", file=sys.stderr)
        raise typer.Exit(1)
    print(folder)


@app.command()
def info() -> None:
    """Say what this checkout and this machine have: versions, kernels, data, tracking."""
    from rich.console import Console
    from rich.table import Table

    from pipelines.info import facts

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts():
        table.add_row(f"[bold]{name}[/]", value)
    Console(soft_wrap=True).print(table)


def _with_bar(planned: Any, executor: Any) -> list[Any]:
    from tqdm import tqdm

    from pipelines import batch as batches

    before = sum(planned.is_done(cell) for cell in planned.cells)
    failed = 0
    title = f"{planned.slug}/{planned.profile}, {executor.places} at once"
    with tqdm(total=len(planned.cells), initial=before, desc=title, unit="cell", smoothing=0) as bar:

        def tell(cell: Any, row: dict[str, Any]) -> None:
            nonlocal failed
            if row["status"] == "failed":
                failed += 1
                bar.write(f"failed {cell.key}: {row['error']}", file=sys.stderr)
            bar.update()
            bar.set_postfix(failed=failed)

        return batches.execute(planned, executor, tell=tell)


def _is_for_users(error: Exception) -> bool:
    """Whether the message was written for whoever typed the command, so that a traceback adds nothing."""
    return type(error).__module__.split(".")[0] in OURS or isinstance(error, OSError)


if __name__ == "__main__":
    main()
