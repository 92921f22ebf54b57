"""`fastloss.profile` records every call correctly, and does not change a program's results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import same_bits

import fastloss
import fastloss.functional as F
from fastloss.__main__ import main
from fastloss._ops import autograd
from fastloss.profiler import profile

ROWS, CLASSES = 512, 2048  # 4 MiB of float32


def draw(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, generator=generator).to(device, dtype).requires_grad_()
    return logits, torch.randint(CLASSES, (ROWS,), generator=generator).to(device)


def test_every_call_with_its_bytes(real_device):
    logits, target = draw(real_device)
    F.cross_entropy(
        logits, target
    ).backward()  # after another upstream gradient, forward keeps no gradients once
    with fastloss.profile() as p:
        F.cross_entropy(logits, target).backward()
        F.cross_entropy(logits, target, reduction="none").sum().backward()
        F.entropy_from_logits(logits.detach())
    assert [c.loss for c in p.calls] == ["cross_entropy", "cross_entropy", "entropy_from_logits"]
    assert [c.operator for c in p.calls] == ["cross_entropy", "cross_entropy", "token_stats"]
    one_pass, two_passes, statistics = p.calls
    size = logits.nbytes
    small = size // 20
    assert one_pass.shape == (ROWS, CLASSES)
    assert one_pass.dtype == "float32"
    assert one_pass.device.startswith(real_device)
    # read and write in forward, nothing but a number in backward
    assert 2 * size <= one_pass.forward.bytes <= 2 * size + small
    assert one_pass.backward[0].bytes <= small
    assert size <= one_pass.forward.extra_bytes <= size + 2 * (1 << 20) + small
    # read in forward, read and write in backward
    assert size <= two_passes.forward.bytes <= size + small
    assert 2 * size <= two_passes.backward[0].bytes <= 2 * size + small
    assert two_passes.forward.extra_bytes <= small
    assert size <= two_passes.backward[0].extra_bytes <= size + 2 * (1 << 20) + small
    assert statistics.backward == []
    for call in p.calls:
        for one in (call.forward, *call.backward):
            assert one.ms > 0
            assert one.start_ms >= 0
    assert one_pass.forward.start_ms + one_pass.forward.ms <= one_pass.backward[0].start_ms


def test_products_count_operations():
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    target = torch.zeros(6, dtype=torch.int64)
    with fastloss.profile() as p:
        F.linear_cross_entropy(x, w, target).backward()
        F.linear_cross_entropy(x, w, target, reduction="none").sum().backward()
    assert [c.forward.flops for c in p.calls] == [3 * 2 * 6 * 5 * 9, 2 * 6 * 5 * 9]
    assert [c.backward[0].flops for c in p.calls] == [0, 3 * 2 * 6 * 5 * 9]


def test_nothing_changes_and_nothing_is_kept(device):
    logits, target = draw(device)
    logits = logits[:8].detach().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(logits, target[:8]), logits)[0]
    with fastloss.profile() as p:
        got = torch.autograd.grad(F.cross_entropy(logits, target[:8]), logits)[0]
        with pytest.raises(
            IndexError if device == "cpu" and autograd.namespace() == autograd.LIBRARY else ValueError
        ):
            F.cross_entropy(logits, target[:8] + CLASSES)
            raise ValueError
        torch.func.grad(lambda x: F.cross_entropy(x, target[:8]))(logits)
        second = torch.autograd.grad(F.cross_entropy(logits, target[:8]), logits, create_graph=True)[0]
        torch.autograd.grad(second.square().sum(), logits)
        late = F.cross_entropy(logits, target[:8])
    assert same_bits(got, expected)
    assert autograd.profiler is None
    seen = len(p.calls)
    assert late.requires_grad
    late.backward()  # after the block: not of interest
    F.cross_entropy(logits, target[:8])
    assert len(p.calls) == seen
    assert p.calls[-1].backward == []
    assert not p.spans


def test_equal_calls_are_one_line():
    logits, target = draw()
    with profile() as p:
        for _ in range(3):
            F.cross_entropy(logits, target).backward()
        F.cross_entropy(logits[:7], target[:7])
    several, single = p.groups()
    assert (several.calls, several.shape, single.calls, single.shape) == (3, (512, 2048), 1, (7, 2048))
    assert several.GB_per_s == pytest.approx(
        several.bytes / (several.forward_ms + several.backward_ms) / 1e6, rel=1e-9
    )
    assert 0 < several.of_ceiling < 20
    assert single.backward_ms is None
    assert p.table().row_count == 2


def test_one_at_a_time():
    with fastloss.profile(), pytest.raises(RuntimeError, match="another profile"), fastloss.profile():
        pass
    assert autograd.profiler is None


def test_files(tmp_path):
    logits, target = draw()
    with fastloss.profile() as p:
        F.cross_entropy(logits, target).backward()
    p.chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events] == ["cross_entropy forward", "cross_entropy backward"]
    assert all(e["ph"] == "X" and e["dur"] > 0 for e in events)
    p.plot(tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 5000


def test_nvtx(real_device):
    logits, target = draw(real_device)
    if not torch.backends.cuda.is_built():
        with pytest.raises(RuntimeError, match="NVTX"), fastloss.profile(nvtx=True):
            pass
        assert autograd.profiler is None
    else:
        with fastloss.profile(nvtx=True) as p:
            F.cross_entropy(logits, target).backward()
        assert len(p.calls) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU")
def test_no_synchronisation_inside():
    logits, target = draw("cuda")
    F.cross_entropy(logits, target).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with fastloss.profile() as p:
            F.cross_entropy(logits, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert p.calls[0].forward.ms > 0


def test_torch_profiler_knows_the_names(real_device):
    logits, target = draw(real_device)
    with torch.profiler.profile() as p:
        F.cross_entropy(logits, target).backward()
        F.cross_entropy(logits, target, reduction="none").sum().backward()
    names = {e.key for e in p.key_averages()}
    assert {"fastloss::cross_entropy_fwd", "fastloss::cross_entropy_bwd"} <= names


SCRIPT = """
import sys, torch, fastloss.functional as F
import beside
assert sys.argv[1:] == ["--rows", "3"], sys.argv
F.cross_entropy(torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])).backward()
sys.exit(beside.CODE)
"""


def test_from_the_command_line(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("CODE = 3")
    written, trace, plot = (tmp_path / n for n in ("p.json", "t.json", "r.png"))
    files = ["--json", str(written), "--trace", str(trace), "--plot", str(plot)]
    before = list(sys.argv)
    assert main(["profile", *files, str(script), "--rows", "3"]) == 3
    assert sys.argv == before
    assert "cross_entropy" in capsys.readouterr().out
    (group,) = json.loads(written.read_text())
    assert (group["loss"], group["shape"], group["calls"]) == ("cross_entropy", [3, 5], 1)
    assert len(json.loads(trace.read_text())["traceEvents"]) == 2
    assert plot.stat().st_size > 0
    assert main(["profile", str(tmp_path / "nothing.py")]) == 2


@pytest.mark.slow
def test_importing_fastloss_imports_no_plots():
    code = "import sys, fastloss; sys.exit(any(m in sys.modules for m in ('rich', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
