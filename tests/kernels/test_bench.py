"""`make bench`: what it writes, that it compares like with like, and that a missing peer is a row. Never a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from kernels import bench
from kernels.bench import Case, Contender
from kernels.ct import bench as ct_bench
from kernels.splat import bench as splat_bench

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kernels.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The file and the screen of a quick run; an op that is no more and one that is not run were in the file before."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    path.write_text(json.dumps({"runs": {"gone": {}}, "rows": [{"op": "gone"}, {"op": "ct", "case": "old"}]}))
    result = run("ct", "--quick", "--out", str(path))
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text()), result.stdout


def test_every_op_tells_what_to_time() -> None:
    assert "ct" in bench.OPS
    for op in bench.OPS:
        module = import_module(f"kernels.{op}.bench")
        assert module.__doc__ and module.cases.__doc__ and isinstance(module.PEERS, tuple)


def test_rows_are_whole_and_in_order(quick: tuple[dict, str]) -> None:
    rows = quick[0]["rows"]
    assert {row["op"] for row in rows} == {"ct"} and "old" not in {row["case"] for row in rows}
    assert [(row["case"].split()[0], row["call"]) for row in rows if row["implementation"] == "ours reference"] == [
        (beam, call) for beam in ("parallel", "fan") for call in ("project", "backproject")
    ]
    for row in rows:
        assert set(row) == set(rows[0])
        assert row["threads"] in (1, 2) and row["batch"] in (1, ct_bench.BATCH)
        low, high = row["spread"]["wall_ms"]
        assert 0 < low <= row["wall_ms"] <= high and row["cpu_ms"] >= 0
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["ratio"] == 1 or row["implementation"] != row["baseline"]
        assert row["extra_mib"] is None or row["implementation"].startswith("ours")


def test_the_same_discretisation_gives_the_same_numbers(quick: tuple[dict, str]) -> None:
    for row in quick[0]["rows"]:
        if row["implementation"].startswith("ours"):
            assert row["difference"] < 2e-6, row
        elif row["implementation"] == "astra linear":
            assert row["difference"] < 2e-3, row  # its positions are float32, and this is noise
        else:
            assert row["difference"] is None and row["note"].startswith(ct_bench.OTHER)


def test_the_steps_of_a_problem_are_counted_the_same_for_all() -> None:
    (case,) = splat_bench.cases(quick=True)
    rows = bench.measure("splat", case, rounds=1)
    assert len({row["work"] for row in rows}) == 1 and rows[0]["work"] > 10_000
    for row in rows:
        assert row["difference"] < 2e-6, row
        rate = row["work"] / row["wall_ms"] / 1e3  # millions a second
        assert f"{rate:.0f}" in bench._line(row).split()
    scene = splat_bench.sheet(1, 16, 16)
    scene[0], scene[2], scene[3] = torch.tensor([[0.0, 0.0, 3.0]]), torch.full((1, 3), 1e-3), torch.tensor([0.9])
    # a point blurred by 0.3 pixels^2 with an opacity of 0.9 stays above 1/255 as far as 1.8 pixels from its centre
    centres = torch.arange(16) + 0.5 - 8
    near = (centres[:, None] ** 2 + centres**2 < 2 * 0.3 * torch.log(torch.tensor(0.9 * 255))).sum()
    assert splat_bench.drawn_pairs(scene, 16, 16) == near == 12


def test_the_machine_is_told_without_its_paths(quick: tuple[dict, str]) -> None:
    report, screen = quick
    assert list(report) == ["machine (ct)", "runs", "rows"] and list(report["runs"]) == ["ct"]
    facts = report["runs"]["ct"]
    assert facts["kernels"]["isa"] and facts["kernels"]["stamp"] and "binary" not in facts["kernels"]
    assert facts["versions"]["torch"] and "astra-toolbox" in facts["versions"] and facts["quick"] is True
    assert facts["cpu"] in report["machine (ct)"] and len(facts["load_average"]) == 3
    for path in (ROOT, sys.prefix, Path.home()):
        assert f"{path}{os.sep}" not in json.dumps(report)
    assert "ct  project, parallel 48^2/12" in screen and "astra line_fanflat" in screen


def test_other_ops_keep_their_rows_and_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "OPS", ["ct", "nm"])
    path, facts = tmp_path / "results" / "bench.json", bench._facts(())
    bench._write(path, "nm", [{"op": "nm", "case": 1}], facts | {"commit": "first"})
    bench._write(path, "ct", [{"op": "ct", "case": 1}, {"op": "ct", "case": 2}], facts | {"commit": "second"})
    bench._write(path, "ct", [{"op": "ct", "case": 3}], facts | {"commit": "third"})
    report = json.loads(path.read_text())
    assert report["rows"] == [{"op": "ct", "case": 3}, {"op": "nm", "case": 1}]
    assert {op: run["commit"] for op, run in report["runs"].items()} == {"ct": "third", "nm": "first"}
    assert "commit third" in report["machine (ct)"] and "commit first" in report["machine (nm)"]
    assert [entry.name for entry in path.parent.iterdir()] == ["bench.json"]


def test_a_wrong_op_or_file_is_refused_before_anything_runs(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["tc"])
    assert caught.value.code == 2
    assert "unknown op 'tc'; expected one of attention, ct" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"x\.json holds something else than benchmarks; remove it"):
        bench.main(["ct", "--out", str(tmp_path / "x.json")])


def test_without_a_binary_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_NATIVE", str(tmp_path))
    result = run("ct", "--quick")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "make kernels" in result.stderr


def test_a_missing_peer_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ct_bench, "find_spec", lambda name: None)
    case = next(ct_bench.cases(quick=True))
    rows = {row["implementation"]: row for row in bench.measure("ct", case, rounds=1)}
    assert len({frozenset(row) for row in rows.values()}) == 1, "rows differ in their keys"
    for name in ("astra linear", "astra line", "skimage radon"):
        assert "is not installed: make setup-peers" in rows[name]["note"]
        assert rows[name]["wall_ms"] is rows[name]["ratio"] is None
        assert name in bench._line(rows[name])
    ours = rows["ours reference"]
    assert ours["wall_ms"] > 0 and ours["ratio"] is None and "None" not in bench._line(ours)


def fake(name: str, order: list[str], value: float = 1.0, **options) -> Contender:
    def call() -> torch.Tensor:
        order.append(name)
        return torch.full((2,), value)

    return Contender(name, call, **({"result": lambda out: out} | options))


def test_rounds_interleave_and_ratios_are_of_one_round_and_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = {"ours": iter([1.0, 2.0, 4.0]), "peer": iter([6.0, 4.0, 4.0])}

    def sample(contender: Contender, calls: int) -> tuple[float, float]:
        contender.run()
        return (next(seconds[contender.name]),) * 2

    pair = [fake("ours", order, value=1.1, batch=2), fake("peer", order)]
    case = Case("case", "call", pair, "peer", lambda: torch.ones(2, dtype=torch.float64), 0)
    monkeypatch.setattr(bench, "ROUNDS", (3, 3))
    monkeypatch.setattr(bench, "_sample", sample)
    seconds = {name: iter([9.0, *values]) for name, values in seconds.items()}  # 9: the first, to see how long it takes
    ours, peer = bench.measure("ct", case)
    assert order[4:] == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert ours["ratio"] == 4.0  # of 12, 4 and 2: twice 6/1, 4/2 and 4/4
    assert (ours["ratio_low"], ours["ratio_high"]) == (3.0, 8.0)
    assert peer["ratio"] == peer["ratio_low"] == peer["ratio_high"] == 1.0
    assert ours["wall_ms"] == 2000.0 and ours["rounds"] == 3
    assert ours["difference"] == pytest.approx(0.1, rel=1e-6) and peer["difference"] == 0


def test_a_case_ends_after_its_time_and_not_before_some_rounds() -> None:
    least, most = bench.ROUNDS
    assert not bench._enough(least - 1, 1e9, None) and bench._enough(least, 1e9, None)
    assert not bench._enough(most - 1, 0.0, None) and bench._enough(most, 0.0, None)
    assert bench._enough(1, 0.0, 1)


def test_memory_is_what_a_call_adds() -> None:
    def call(mib: int) -> torch.Tensor:
        return torch.ones(2 * mib << 18)[:1].clone()  # float32; one block, freed before the call returns

    # a second block would take the room of the first or another hole of the heap, as the C library likes
    for mib in (8, 32, 8):  # what an earlier call has freed must count again
        found = bench._extra_mib(Contender("ours", lambda mib=mib: call(mib), ours=True))
        if found is None:
            pytest.skip("this system does not tell the peak of a call")
        assert found == pytest.approx(2 * mib, abs=1.0)
    assert bench._extra_mib(Contender("peer", lambda: None)) is None


def test_instruction_sets_are_those_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import info

    monkeypatch.delenv("KERNELS_ISA", raising=False)
    others = bench.other_isas()
    assert info()["isa"] not in others and "emulated512" not in others
    for isa in others:
        assert bench.with_isa(isa, info)["isa"] == isa
    assert "KERNELS_ISA" not in os.environ
    monkeypatch.setenv("KERNELS_ISA", "portable")
    assert bench.other_isas() == []
