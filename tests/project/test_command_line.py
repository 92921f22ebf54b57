"""`check` finds wrong results, `bench` does not time them, and both report them by their exit code."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastloss import _registry
from fastloss.__main__ import main
from fastloss._cli import bench_worker, check, info
from fastloss._registry import accuracy, losses

ROOT = Path(__file__).parents[2]
RESULTS = sorted(ROOT.glob("benchmarks/results/*/*/results.json*"))
LOSS = losses()[0]
CASE = next(iter(LOSS.cases))
SHAPE = next(s for s in LOSS.shapes if len(s) == 2 and min(s) > 1)
SPEC = bench_worker.BenchSpec(
    loss=LOSS.name,
    case=CASE,
    shape=SHAPE,
    dtype="float32",
    device="cpu",
    backward=True,
    threads=None,
    rounds=2,
    budget=1.0,
    peers=None,
)


class Scaled(torch.autograd.Function):
    """Scales the value by one factor and the gradient by another."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return x * value

    @staticmethod
    def backward(ctx, g):
        return g * ctx.gradient, None, None


class ForgetsUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.ones_like(g)


MISTAKES = {
    "value": lambda **k: Scaled.apply(LOSS.reference(**k), 1.001, 1.0),
    "gradient": lambda **k: Scaled.apply(LOSS.reference(**k), 1.0, 1.001),
    "upstream": lambda **k: ForgetsUpstream.apply(LOSS.reference(**k)),
    "nan": lambda **k: Scaled.apply(LOSS.reference(**k), 1.0, float("nan")),
    "dtype": lambda **k: LOSS.reference(**k).double(),
    "shape": lambda **k: LOSS.reference(**k).reshape(1),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_compare_finds(mistake):
    result = check.compare(LOSS, CASE, SHAPE, torch.float32, function=MISTAKES[mistake])
    assert not result.ok, result


def test_compare_accepts_the_best_that_a_dtype_can_hold():
    def rounded(**kwargs):
        return LOSS.reference(**accuracy.cast(kwargs, torch.float64)).to(kwargs[LOSS.wrt[0]].dtype)

    for dtype in accuracy.DTYPES:
        result = check.compare(LOSS, CASE, SHAPE, dtype, function=rounded)
        assert result.ok, result


def test_a_lost_row_is_found_in_every_dtype():
    def loses_a_row(**kwargs):
        first = LOSS.wrt[0]
        kept = kwargs[first].detach().clone()
        kwargs[first] = torch.cat([kwargs[first][:-1], kept[-1:]])
        return LOSS.reference(**kwargs)

    for dtype in accuracy.DTYPES:
        assert not check.compare(LOSS, CASE, SHAPE, dtype, function=loses_a_row).ok


@pytest.mark.parametrize(("function", "code"), [(LOSS.function, 0), (MISTAKES["gradient"], 1)])
def test_exit_code_of_check(function, code, monkeypatch, capsys):
    planted = replace(LOSS, function=function, shapes=(SHAPE,))
    monkeypatch.setitem(_registry.spec._losses, LOSS.name, planted)
    assert main(["check", "--loss", LOSS.name, "--device", "cpu"]) == code
    assert ("FAIL" in capsys.readouterr().out) == bool(code)


def test_check_draws_the_inputs_of_its_seed(monkeypatch, capsys):
    drawn = []

    def inputs(draw, shape):
        drawn.append(draw.seed)
        return LOSS.inputs(draw, shape)

    monkeypatch.setitem(_registry.spec._losses, LOSS.name, replace(LOSS, inputs=inputs, shapes=(SHAPE,)))
    for arguments, seed in (([], 0), (["--seed", "7"], 7)):
        drawn.clear()
        assert main(["check", "--loss", LOSS.name, "--device", "cpu", *arguments]) == 0
        assert set(drawn) == {seed}


def test_check_goes_on_after_a_loss_that_raises(monkeypatch, capsys):
    def raises(**kwargs):
        raise RuntimeError("planted")

    monkeypatch.setitem(_registry.spec._losses, LOSS.name, replace(LOSS, function=raises, shapes=(SHAPE,)))
    assert main(["check", "--loss", LOSS.name, "--device", "cpu"]) == 1
    assert capsys.readouterr().out.count("planted") == len(LOSS.cases) * len(accuracy.DTYPES)


def test_bench_skips_a_wrong_candidate(monkeypatch):
    planted = replace(LOSS, function=MISTAKES["gradient"])
    monkeypatch.setattr(
        bench_worker, "candidates", lambda *_: {"eager": LOSS.reference, "fastloss": planted.function}
    )
    measured = bench_worker.measure(planted, SPEC, 1, lambda **_: None)
    assert set(measured["regimes"]) == set(bench_worker.REGIMES)
    assert all(set(m["times"]) == {"eager", "copy"} for m in measured["regimes"].values())
    assert "wrong" in measured["skipped"]["fastloss"]
    assert set(measured["peaks"]) == {"eager"}


@pytest.mark.parametrize(
    ("max_step_seconds", "seconds", "reason"),
    [(1.0, 1.5, "a step takes"), (0.5, 600.0, "given up after 6 s")],
)
def test_bench_does_not_wait_for_the_slow(monkeypatch, max_step_seconds, seconds, reason):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return LOSS.reference(*args, **kwargs)

    monkeypatch.setattr(bench_worker, "candidates", lambda *_: {"eager": LOSS.reference, "slow": slow})
    measured = bench_worker.measure(
        LOSS, replace(SPEC, max_step_seconds=max_step_seconds), 1, lambda **_: None
    )
    assert reason in measured["skipped"].pop("slow")
    assert not measured["skipped"]


def test_a_measuring_process_that_dies_is_named():
    with pytest.raises(RuntimeError, match="ended with -9"):
        bench_worker.in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="KeyError: 'planted'"):
        bench_worker.in_fork(lambda: {}["planted"])


def test_bench_sees_one_wrong_element_of_the_full_shape():
    right = {"value": torch.tensor(1.0), "input": torch.rand(2**22 + 5)}
    wrong = {k: v.clone() for k, v in right.items()}
    wrong["input"][-1] += 0.01
    assert bench_worker.disagreement(right, right, torch.float32) == ""
    assert "input" in bench_worker.disagreement(wrong, right, torch.float32)


def test_bench_knows_a_gradient_that_jumps(monkeypatch):
    """In bfloat16 eager PPO clips other ratios than float32 would, which is no mistake of a float32 computation."""
    (clipped,) = losses("policy_loss")
    functions = {"eager": clipped.reference, "fastloss": clipped.function}
    monkeypatch.setattr(bench_worker, "candidates", lambda *_: functions)
    spec = replace(SPEC, loss=clipped.name, case="ppo", shape=(64, 4096), dtype="bfloat16")
    comparison = bench_worker.Comparison(clipped, spec)
    found = {name: comparison.step(name).results() for name in functions}
    assert bench_worker.disagreement(found["fastloss"], found["eager"], torch.bfloat16)
    assert comparison.skipped(lambda **_: None) == {}


def test_ratios_are_taken_within_rounds():
    measured = {
        "times": {"eager": [2.0, 40.0, 6.0], "copy": [1.0, 10.0, 1.0], "x": [1.0, 10.0, 6.0]},
        "ceiling": "copy",
        "work": 6e6,
    }
    assert bench_worker.summary(measured, "x") == {
        "ms": 6.0,
        "GB_per_s": 1.0,
        "rounds": 3,
        "of_copy": 1.0,
        "x_eager": 2.0,
    }


@pytest.mark.slow
def test_bench_from_the_command_line(tmp_path, capsys):
    shape = "x".join(map(str, SHAPE))
    written = tmp_path / "result.json"
    plot = tmp_path / "times.png"
    arguments = ["--shape", shape, "--rounds", "2", "--json", str(written), "--plot", str(plot)]
    assert main(["bench", LOSS.name, "--device", "cpu", *arguments]) == 0
    report = json.loads(written.read_text())
    rows = {row["candidate"]: row for row in report["rows"]}
    assert {"eager", "torch.compile", "fastloss", "copy"} <= set(rows)
    for row in rows.values():
        assert "refused" not in row
        assert all(row["times"][regime]["ms"] > 0 for regime in ("malloc", "recycled"))
    assert report["machine"]["torch"] == torch.__version__
    assert plot.stat().st_size > 0
    assert "fastloss" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_of_a_table(tmp_path, capsys):
    table = tmp_path / "table.json"
    rows = [{"loss": LOSS.name, "shape": [n, 8], "dtype": "float32", "forward_only": n == 2} for n in (2, 3)]
    table.write_text(json.dumps(rows))
    assert main(["bench", "--table", str(table), "--out", str(tmp_path / "out"), "--rounds", "2"]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "2x8 float32, forward, " in report
    assert "3x8 float32, forward + backward, " in report
    plot = (tmp_path / "out" / "times.svg").read_text()
    assert "2x8 float32, forward, " in plot
    assert "3x8 float32, forward + backward, " in plot
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.md", "results.json", "times.svg"}


@pytest.mark.parametrize("results", RESULTS, ids=lambda p: "/".join(p.parts[-3:]))
@pytest.mark.slow
def test_committed_reports_are_those_of_their_numbers(results, tmp_path):
    (tmp_path / results.name).write_bytes(results.read_bytes())
    assert main(["bench", "--from", str(tmp_path)]) == 0
    for name in (results.name, "report.md"):
        assert (tmp_path / name).read_bytes() == (results.parent / name).read_bytes()
    assert (tmp_path / "times.svg").is_file()
    assert (results.parent / "times.svg").is_file()


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/*.json")), ids=lambda p: p.stem)
def test_tables_name_what_there_is(file):
    for row in json.loads(file.read_text()):
        (loss,) = losses(row["loss"])
        assert len(row["shape"]) in {len(shape) for shape in loss.shapes}
        assert "case" not in row or row["case"] in loss.cases
        assert hasattr(torch, row["dtype"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "no_such_loss"],
        ["bench", LOSS.name, "--case", "no such case"],
        ["check", "--loss", "no_such_loss"],
    ],
)
def test_unknown_names_are_answered_in_a_sentence(arguments, capsys):
    assert main(arguments) == 2
    assert "no" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["this machine"]["torch"] == torch.__version__
    assert facts["built"]["cpu_capabilities"]
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("nvcc", "driver", "needed"),
    [
        ("13.0", "12.4", "CUDA 13 (580 or newer)"),
        ("12.8", "11.8", "CUDA 12 (525 or newer)"),
        ("14.1", "13.2", "CUDA 14"),
        ("13.2", "13.0", None),
        ("12.8", "13.0", None),
        ("13.0", None, None),
        (None, "12.4", None),
    ],
)
def test_info_tells_of_a_driver_that_is_too_old(nvcc, driver, needed):
    """A library runs on drivers of its CUDA's major version and on newer ones."""
    built = {"nvcc": nvcc, "cuda": nvcc is not None}
    here = {"kernels_for": "avx2", "threads": 2, "gpus": [{"name": "a card"}], "driver_cuda": driver}
    said = info.will_use(built, here)["cuda tensors"]
    if needed is None:
        assert "driver" not in said
        return
    assert f"needs a driver for {needed}, but the driver is for CUDA {driver};" in said
    assert f"an nvcc of CUDA {driver.split('.')[0]}" in said


@pytest.mark.parametrize(
    ("reported", "failed", "version"), [(12040, 0, "12.4"), (13000, 0, "13.0"), (0, 3, None)]
)
def test_info_asks_the_driver(reported, failed, version, monkeypatch):
    class Library:
        @staticmethod
        def cuDriverGetVersion(where):
            where._obj.value = reported
            return failed

    monkeypatch.setattr(info.ctypes, "CDLL", lambda name: Library)
    assert info.cuda_of_driver() == version


def test_info_without_a_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(info.ctypes, "CDLL", missing)
    assert info.cuda_of_driver() is None
    assert info.machine()["driver_cuda"] is None
