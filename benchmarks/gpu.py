"""What only a GPU can show, in one run of at most `--minutes`: `make gpu`.

1. fastloss loads: a build that was carried along, else one for this GPU is made (beyond the minutes).
2. Side by side, since none of it is timed: the tests on CUDA, with the cases beyond 2^31 elements and the capture
   in CUDA graphs; compute-sanitizer (memcheck, racecheck) over small calls of every loss (`every_loss.py`).
3. What a call costs the host, and the same step as a CUDA graph (`overhead.py`).
4. The table of `gpu.json` beside eager PyTorch, torch.compile and the peers that are installed, for the time that
   is left; it begins with what matters most, and each row is written as soon as it is measured.

Everything goes into `results/<gpu>/`: report.md, results.json and plots, overhead.json, and a log of each part.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
CHECKS_SHARE, OVERHEAD_SECONDS = 0.45, 45.0
"""Of the minutes for the second part; the most that the third one takes."""
PARTS = ("tests", "sanitizer", "overhead", "table")


@dataclass
class Part:
    """A command, what it needs beyond `ENVIRONMENT`, and whether running out of time leaves a result."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] | None = None
    partial: bool = False


def stop(process: subprocess.Popen[bytes]) -> None:
    """It and what it has started; first so that it can write what it has."""
    for sign, seconds in ((signal.SIGINT, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run(parts: Sequence[Part], seconds: float, logs: Path) -> bool:
    """Whether all went well, side by side in so many seconds; what they print goes to a log of each."""
    start = time.monotonic()
    running = []
    for part in parts:
        print(f"== {part.name}: {' '.join(part.command)}", flush=True)
        with open(logs / f"{part.name}.log", "wb") as log:
            environment = {**ENVIRONMENT, **(part.environment or {})}
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        running.append((part, process))
    good = True
    try:
        for part, process in running:
            try:
                code = process.wait(max(1.0, seconds - (time.monotonic() - start)))
                fine = code == 0
                verdict = "passed" if fine else f"exit code {code}"
            except subprocess.TimeoutExpired:
                stop(process)
                fine, verdict = part.partial, f"stopped after {seconds:.0f} s"
            print(f"== {part.name}: {verdict}, {time.monotonic() - start:.0f} s", flush=True)
            if not fine:
                text = (logs / f"{part.name}.log").read_text(errors="replace")
                print("\n".join(text.splitlines()[-30:]), flush=True)
            good &= fine
    finally:
        for _, process in running:
            if process.poll() is None:
                stop(process)
    return good


def python(name: str, *arguments: str, **more: object) -> Part:
    return Part(name, (sys.executable, *arguments), **more)


def tests() -> Part:
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    only = ["-k", "cuda", "--ignore", "tests/cuda_on_cpu"]  # no test that never touches the GPU
    return python("tests", "-m", "pytest", "--devices", "cuda", "--large", *only, *workers)


def sanitized(tool: str, sanitizer: str) -> Part:
    options = ("--error-exitcode", "9", "--tool", tool, "--kernel-name", "kns=fastloss")
    # pages of a caching allocator would hide what is read or written beyond a tensor's end
    return Part(
        tool,
        (sanitizer, *options, sys.executable, "benchmarks/every_loss.py"),
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else None,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results/<gpu>")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything but a build; default: 8")
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="timing per row")
    parser.add_argument("--skip", action="append", default=[], choices=PARTS)
    args = parser.parse_args()

    absent = [
        m for m in ("torch", "pytest", "hypothesis", "rich", "matplotlib") if not importlib.util.find_spec(m)
    ]
    if absent:
        print(f"make gpu needs {', '.join(absent)} beside this Python: {sys.executable}", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a GPU that torch sees, and this torch sees none", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    if subprocess.run([sys.executable, "-c", "import fastloss"], cwd=ROOT, env=ENVIRONMENT).returncode:
        major, minor = torch.cuda.get_device_capability()
        ENVIRONMENT.update(FASTLOSS_CUDA="1", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")
        build = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
        if subprocess.run(build, cwd=ROOT, env=ENVIRONMENT).returncode:
            return 1
    out = args.out or ROOT / "benchmarks" / "results" / name.lower().replace(" ", "-")
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    good = [run([python("info", "-m", "fastloss", "info")], 60.0, logs)]
    print((logs / "info.log").read_text(), flush=True)

    checks = [] if "tests" in args.skip else [tests()]
    if "sanitizer" not in args.skip:
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            print("== memcheck, racecheck: compute-sanitizer is not installed")
            good.append(False)
        else:
            checks += [sanitized(tool, sanitizer) for tool in ("memcheck", "racecheck")]
    if checks:
        good.append(run(checks, CHECKS_SHARE * 60 * args.minutes, logs))
    if "overhead" not in args.skip:
        part = python("overhead", "benchmarks/overhead.py", "--out", str(out / "overhead.json"), partial=True)
        good.append(run([part], OVERHEAD_SECONDS, logs))
    if "table" not in args.skip:
        table = ("--table", "benchmarks/gpu.json", "--peers", "benchmarks/peers.py", "--out", str(out))
        # matrices of 8 GiB come and go: without it what is free lies in pieces
        memory = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        bench = ("-m", "fastloss", "bench", "--device", "cuda", *table, "--budget", str(args.budget))
        part = python("table", *bench, environment=memory, partial=True)
        good.append(run([part], end - time.monotonic() - 15.0, logs))
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
