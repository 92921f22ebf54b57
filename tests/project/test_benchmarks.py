"""The files of `benchmarks` name existing losses, and work without further packages."""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastloss.__main__ import main
from fastloss._cli import gpu_report
from fastloss._cli.check import compare
from fastloss._registry import losses

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEVICES = ("cpu", "cuda")


@pytest.fixture
def file():
    return runpy.run_path(str(BENCHMARKS / "peers.py"))


def seen_by(file, monkeypatch, **names):
    """The names in the file's own functions replaced."""
    for name, value in names.items():
        monkeypatch.setitem(file["peers"].__globals__, name, value)
    return file["peers"]


def test_peers_are_of_losses_that_there_are(file):
    assert set(file["PROVIDERS"]) <= {loss.name for loss in losses()}
    ours = {"eager", "torch.compile", "fastloss", "fastloss in place", "copy", "products"}
    for providers in file["PROVIDERS"].values():
        assert not ours & set(providers)
        for module, where, load in providers.values():
            assert module.replace(".", "_").isidentifier()
            assert set(where) <= set(DEVICES)
            assert callable(load)


def test_peers_that_are_not_installed_are_left_out(file, monkeypatch):
    def no_parent(module):
        raise ModuleNotFoundError(module)

    for find in (lambda module: None, no_parent):
        peers = seen_by(file, monkeypatch, find_spec=find)
        assert not any(peers(loss, device) for loss in file["PROVIDERS"] for device in DEVICES)


def test_peers_run_where_they_can(file, monkeypatch):
    peers = seen_by(file, monkeypatch, find_spec=lambda module: module)
    for loss, providers in file["PROVIDERS"].items():
        assert set(peers(loss, "cuda")) == set(providers)
        assert set(peers(loss, "cpu")) == {k for k, (_, where, _) in providers.items() if "cpu" in where}
    assert peers("a loss without peers", "cpu") == {}


def test_a_peer_that_cannot_be_imported_raises_only_when_it_is_called(file, monkeypatch):
    def broken():
        raise RuntimeError("operator does not exist")

    peers = seen_by(file, monkeypatch, PROVIDERS={"a loss": {"other": ("torch", ("cpu",), broken)}})
    with pytest.raises(ImportError, match=r"torch cannot be imported here: operator does not exist"):
        peers("a loss", "cpu")["other"]()


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has no chunks")
def test_a_peer_gives_what_fastloss_gives_or_raises(file):
    peer = file["peers"]("linear_cross_entropy", "cpu")["torch in chunks"]
    result = compare("linear_cross_entropy", "plain", (7, 200, 130), torch.float32, function=peer)
    assert result.relative < torch.finfo(torch.float32).eps ** 0.5
    with pytest.raises(TypeError, match="logit_scale"):
        compare("linear_cross_entropy", "everything", (7, 200, 130), torch.float32, function=peer)


def test_the_sanitizer_sees_every_case_and_every_shape():
    program = runpy.run_path(str(BENCHMARKS / "every_loss.py"))
    for loss in losses():
        cases, shapes = zip(*program["calls"](loss), strict=True)
        long = program["LONG"].get(loss.name)
        assert set(cases) == set(loss.cases)
        assert set(shapes) == set(loss.shapes) | ({long} if long else set())
        assert max(map(math.prod, loss.shapes)) <= 2**20


def test_cost_of_a_call():
    measure = runpy.run_path(str(BENCHMARKS / "overhead.py"))["measure"]
    row = measure(losses()[0], 1, "cpu")
    assert row["eager"] > 0
    assert row["fastloss"] > 0


@pytest.mark.slow
def test_the_gpu_run_is_rehearsed_without_a_gpu(tmp_path):
    command = [
        sys.executable,
        BENCHMARKS / "gpu.py",
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--seconds",
        "240",
    ]
    ran = subprocess.run([*command, "--stages", "ceilings,times,kernels"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + (tmp_path / "log.txt").read_text()
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in results} == {"start", "ceilings", "times", "kernels"}
    assert not [r for r in results if "failed" in r]
    assert all(r["ms"] > 0 for r in results if r["stage"] == "times" and "row" in r)
    assert "cross_entropy" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("where", DEVICES)
def test_the_stages_of_a_gpu_run_fit_its_time(where):
    file = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    stages = file["stages"](argparse.Namespace(device=where, beside=None, stages=None))
    names = [stage.name for stage in stages]
    assert names[:4] == ["ceilings", "smoke", "numbers", "times"], "what tells most comes first"
    for name in names:
        assert re.search(rf"^{name} ", file["__doc__"], re.MULTILINE)
    for i, stage in enumerate(stages):
        chosen = file["stages"](argparse.Namespace(device=where, beside=None, stages=stage.name))
        assert [c.name for c in chosen] == [names[i]]
        assert stage.seconds <= 120
    rows = json.loads((BENCHMARKS / "gpu.json").read_text())
    assert max(file["COUNTED"]) < len(rows)


def test_a_stage_of_a_gpu_run_ends_at_its_limit(tmp_path):
    """Results up to then are on the disk; the next command is not started."""
    file = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    command = "import time; print('{\"found\": 1}', flush=True); print('words', flush=True); time.sleep(60)"
    sleeper = file["Command"]((sys.executable, "-c", command), {}, "own.txt")
    results = file["Results"](tmp_path)
    start = time.monotonic()
    good = file["run_stage"](file["Stage"]("slow", 4.0, [sleeper, sleeper]), start + 60.0, results)
    assert not good
    assert time.monotonic() - start < 30.0
    found, ended = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert found == {"stage": "slow", "found": 1}
    assert "1 x stopped at its limit" in ended["ended"]
    assert "1 x not begun" in ended["ended"]
    assert (tmp_path / "own.txt").read_text().startswith("words\n")


ROW = {"loss": "mse_loss", "shape": [64, 1024], "dtype": "float32"}
FORWARD = {**ROW, "dtype": "bfloat16", "case": "weight", "forward_only": True}
SHARE = {"ceiling": "copy", "of_ceiling": 0.5, "extra_MiB": 3.0}
RECORDS = [
    {"stage": "start", "card": "a card", "note": ""},
    {"stage": "ceilings", "ceiling": "copy", "GB_per_s": 1234.5},
    {"stage": "smoke", "calls": 8, "failures": 0},
    {"stage": "times", "tree": "this", "row": ROW, "candidate": "fastloss", "ms": 0.25, **SHARE},
    {"stage": "times", "tree": "this", "row": FORWARD, "candidate": "fastloss", "ms": 0.125, **SHARE},
    {"stage": "times", "tree": "beside", "row": ROW, "candidate": "fastloss", "ms": 0.75, **SHARE},
    {"stage": "times", "ended": "2 x passed", "seconds": 3.0},
    {"stage": "peers", "tree": "", "row": ROW, "candidate": "Liger", "failed": "RuntimeError: none"},
    {"stage": "peers", "tree": "", "row": ROW, "candidate": "eager", "ms": 2.0, "how": "events"},
]


def folder_of(folder, records):
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_a_gpu_run_is_reported_and_plotted_afterwards(tmp_path):
    """A tree beside is another candidate; what failed is in the table and not in the plot."""
    assert main(["bench", "--from", str(folder_of(tmp_path, RECORDS))]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "![times](times.svg)" in report
    lines = report.splitlines()
    first = lines.index("| row | candidate | ms | of ceiling | extra MiB |")
    assert lines[first + 2 :] == [
        "| mse_loss 64x1024 float32 | fastloss (this) | 0.25 | 50% of copy | 3.0 |",
        "| mse_loss 64x1024 float32 | fastloss (beside) | 0.75 | 50% of copy | 3.0 |",
        "| mse_loss 64x1024 float32 | Liger | RuntimeError: none | - | - |",
        "| mse_loss 64x1024 float32 | eager | 2 | - | - |",
        "| mse_loss 64x1024 bfloat16 (weight), forward | fastloss (this) | 0.125 | 50% of copy | 3.0 |",
    ]
    plot = (tmp_path / "times.svg").read_text()
    for text in (
        "0.250  fastloss (this)",
        "0.750  fastloss (beside)",
        "2.00  eager",
        "bfloat16 (weight), forward",
    ):
        assert text in plot
    assert plot.count("50% of copy") == 3
    assert "Liger" not in plot


def test_a_gpu_run_without_times_has_no_plot(tmp_path):
    assert main(["bench", "--from", str(folder_of(tmp_path, RECORDS[:3]))]) == 0
    assert "8 calls, 0 failed" in (tmp_path / "report.md").read_text()
    assert "times.svg" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "times.svg").exists()


def test_a_folder_without_results_is_told_what_it_lacks(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        assert main(["bench", "--from", str(folder)]) == 2
        error = capsys.readouterr().err
        assert all(name in error for name in (str(folder), "results.json,", "results.jsonl,", "make gpu"))
    (tmp_path / "results.jsonl").write_text('{"stage": "start"}\n{"stage": "ti')
    assert main(["bench", "--from", str(tmp_path)]) == 2
    assert "line 2 of" in capsys.readouterr().err


def test_the_report_of_a_gpu_run_needs_no_package():
    """gpu.py writes it on machines where fastloss is not built yet, or does not load."""
    for node in ast.walk(ast.parse(Path(gpu_report.__file__).read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_gpu_run_writes_its_report(tmp_path):
    write_report = runpy.run_path(str(BENCHMARKS / "gpu.py"))["write_report"]
    write_report(folder_of(tmp_path, RECORDS))
    assert (tmp_path / "report.md").read_text() == gpu_report.markdown(RECORDS)
