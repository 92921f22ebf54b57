"""What only a GPU can show, in one run: `make gpu`.

1. fastloss loads: a build that was carried along, else one for this GPU is made.
2. The test suite on CUDA, with the cases beyond 2^31 elements and the capture in CUDA graphs.
3. compute-sanitizer (memcheck, racecheck) over `fastloss check`, small calls of every loss.
4. The table of `gpu.json` beside eager PyTorch, torch.compile and the peers that are installed, into
   `results/<gpu>/`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def run(what: str, *command: str) -> bool:
    """Whether a command went well; what it prints goes to the terminal."""
    print(f"\n== {what}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT).returncode
    print(f"== {what}: {'passed' if code == 0 else f'exit code {code}'}, {time.monotonic() - start:.0f} s")
    return code == 0


def python(what: str, *arguments: str) -> bool:
    return run(what, sys.executable, *arguments)


def sanitized(tool: str) -> bool:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print(f"== {tool}: compute-sanitizer is not installed")
        return False
    options = ("--error-exitcode", "9", "--tool", tool)
    return run(tool, sanitizer, *options, sys.executable, "-m", "fastloss", "check", "--device", "cuda")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results/<gpu>")
    parser.add_argument("--budget", type=float, default=2.0, metavar="SECONDS", help="timing per row")
    parser.add_argument("--skip", action="append", default=[], choices=("tests", "sanitizer", "table"))
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
        if not python("build", "setup.py", "--quiet", "build_ext", "--inplace"):
            return 1
    out = args.out or ROOT / "benchmarks" / "results" / name.lower().replace(" ", "-")
    good = [python("info", "-m", "fastloss", "info")]
    if "tests" not in args.skip:
        workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        good.append(python("check", "-m", "fastloss", "check", "--device", "cuda"))
        good.append(python("tests", "-m", "pytest", "--devices", "cuda", "--large", *workers,
                           "--ignore", "tests/cuda_on_cpu"))  # fmt: skip
    if "sanitizer" not in args.skip:
        good += [sanitized("memcheck"), sanitized("racecheck")]
    if "table" not in args.skip:
        table = ("--table", "benchmarks/gpu.json", "--peers", "benchmarks/peers.py", "--out", str(out))
        budget = ("--budget", str(args.budget))
        good.append(python("table", "-m", "fastloss", "bench", "--device", "cuda", *table, *budget))
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
