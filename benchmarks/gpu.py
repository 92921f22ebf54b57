"""Check and measure on a GPU, in one run of at most `--seconds`: `make gpu`.

The stages, most important first, each with its own time limit; nothing runs concurrently with timed work:

ceilings    versions; what the card does at best: a copy, a product of matrices
smoke       every case of every loss once: does it run at all
numbers     `fastloss check`: every loss against float64
times       fastloss alone over the table gpu.json, as replays of CUDA graphs; also of a second tree (`--beside`)
kernels     the kernels of the most important steps, one by one
counters    the same steps under Nsight Compute: traffic, occupancy, stalls
sanitizer   memcheck and racecheck over every loss
tests       the tests that ask something of kernels, on CUDA
peers       eager, torch.compile and installed peers on the first rows of the table

A folder gets at most eight files, each written as results come, so that whatever ends the run takes nothing along:
results.jsonl (a line a result), log.txt, counters.csv, tests.txt, sanitizer.txt, and report.md after every stage.
`python -m fastloss bench --from FOLDER` writes the report again and plots the times, on any machine. `--stages` runs
some of the stages, `--device cpu` rehearses all of them in small where there is no GPU.

A library that was carried along, `gpu-pack/_library.so.xz` (`make gpu-pack`), is unpacked where none is built.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import os
import queue
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT / "gpu-pack"
WORK = "benchmarks/gpu_work.py"
COUNTED = (0, 2, 3, 5, 9, 10, 11, 21, 34, 38, 40, 41)
"""Rows of the table whose kernels are profiled one by one."""
ENDS_RACECHECK = "multiple_negatives_ranking_loss"
"""A loss at which racecheck has ended itself with an internal error: in a process of its own."""
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
    "SchedulerStats",
    "WarpStateStats",
)
"""The metrics that Nsight Compute reads for each launch."""
TESTS = (
    (
        "tests/contract/test_cuda_graphs.py",
        "tests/contract/test_large.py",
        "tests/contract/test_row_lengths.py",
        "--large",
    ),
    (
        "tests/contract/test_determinism.py",
        "tests/losses/test_classification.py",
        "tests/losses/test_classification_extremes.py",
        "tests/losses/test_rows_of_images.py",
        "tests/losses/test_distillation.py",
        "tests/contract/test_numerics.py",
    ),
)


@dataclass
class Command:
    """A process; its lines of JSON go to results.jsonl, all other output to the log or a file of its own."""

    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    file: str | None = None


@dataclass
class Stage:
    name: str
    seconds: float
    """The time limit in total."""
    commands: list[Command]
    at_once: int = 1


def processes(args: argparse.Namespace) -> int:
    return max(1, min(12, (os.cpu_count() or 2) - 2)) if args.device == "cuda" else 2


def stages(args: argparse.Namespace) -> list[Stage]:
    cuda, n = args.device == "cuda", processes(args)

    def work(what: str, *options: str, tree: str | None = None, **environment: str) -> Command:
        device = ("--device", args.device)
        environment |= {"PYTHONPATH": tree} if tree else {}
        return Command((sys.executable, WORK, what, *device, *options), environment)

    # Side by side: the CPU computes what the GPU's results are compared with, and each process would take all cores.
    alone = {"OMP_NUM_THREADS": "1"}

    def parts(what: str, count: int) -> list[Command]:
        return [work(what, "--part", f"{i}/{count}", **alone) for i in range(count)]

    rows = ",".join(map(str, COUNTED if cuda else COUNTED[:2]))
    some = () if cuda else ("--rows", "0,5", "--budget", "0.01")
    times = [work("times", "--label", "this", *some)]
    kernels = [work("kernels", "--label", "this", "--rows", rows)]
    if args.beside:
        times.append(work("times", "--label", "beside", *some, tree=args.beside))
        kernels.append(work("kernels", "--label", "beside", "--rows", rows, tree=args.beside))
    found = [
        Stage("ceilings", 40, [Command((sys.executable, "-m", "fastloss", "info")), work("ceilings")]),
        Stage("smoke", 60, parts("smoke", min(n, 6)), n),
        Stage("numbers", 90, parts("numbers", n), n),
        Stage("times", 70 * len(times), times),
        Stage("kernels", 30 * len(kernels), kernels),
    ]
    quiet = ("-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:benchmark")
    pytest = (sys.executable, "-m", "pytest", *quiet)
    if cuda:
        smi = (
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem",
            "--format=csv",
        )
        found[0].commands.insert(0, Command(smi))
        sections = [option for name in SECTIONS for option in ("--section", name)]
        ncu = ("ncu", "--clock-control", "none", "--csv", "--page", "raw", *sections)
        # not the sums of a few numbers per row
        mine = ("--kernel-name-base", "function", "--kernel-name", "regex:rows|divergence|elements")
        watched = (sys.executable, WORK, "steps", "--rows", rows)
        found.append(Stage("counters", 70, [Command((*ncu, *mine, *watched), file="counters.csv")]))
        watch = ("compute-sanitizer", "--error-exitcode", "9", "--kernel-name", "kns=fastloss", "--tool")
        apart = [("--without", ENDS_RACECHECK, "--part", f"{i}/6") for i in range(6)]
        # pages of a caching allocator would hide what is read or written beyond a tensor's end
        plain = alone | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(
            Stage(
                "sanitizer",
                80,
                [
                    Command(
                        (*watch, tool, sys.executable, WORK, "smoke", *what),
                        plain if tool == "memcheck" else alone,
                        "sanitizer.txt",
                    )
                    for what in (("--only", ENDS_RACECHECK), *apart)
                    for tool in ("memcheck", "racecheck")
                ],
                12,
            )
        )
        workers = ("--devices", "cuda", "-n", str(n), "--maxfail", "300", "-k", "cuda or large")
        found.append(
            Stage(
                "tests",
                110,
                [Command((*pytest, *files, *workers), alone, file="tests.txt") for files in TESTS],
            )
        )
    else:
        collect = (*pytest, "-qq", "--collect-only", "--devices", "cuda")
        found.append(Stage("tests", 60, [Command((*collect, *files), file="tests.txt") for files in TESTS]))
    others = [
        work("times", "--rows", r, "--candidates", "eager,peers", *some[2:])
        for r in ("0,2,3,7,13", "8,11,14")
    ]
    compiled = [work("times", "--rows", r, "--candidates", "compile", *some[2:]) for r in ("0", "2")]
    found.append(Stage("peers", 100, others + compiled if cuda else others[1:]))
    return [stage for stage in found if not args.stages or stage.name in args.stages.split(",")]


class Results:
    """The folder of results, written as soon as they are known."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lock = folder, threading.Lock()
        self.files: dict[str, IO[str]] = {}

    def write(self, name: str, line: str) -> None:
        with self.lock:
            if name not in self.files:
                self.files[name] = open(self.folder / name, "a", errors="replace")  # noqa: SIM115
            self.files[name].write(line.rstrip("\n") + "\n")
            self.files[name].flush()

    def add(self, **record: Any) -> None:
        self.write("results.jsonl", json.dumps(record))

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.write("log.txt", text)


def kill(process: subprocess.Popen[str], sign: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sign)


def run_command(command: Command, stage: str, until: float, results: Results) -> str:
    """Run the process to its end or to `until`; return how it ended."""
    tree = command.environment.get("PYTHONPATH", str(ROOT))
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        **command.environment,
        "PYTHONPATH": os.pathsep.join(
            [tree, *map(str, sorted(PACK.glob("peers"))), os.environ.get("PYTHONPATH", "")]
        ),
    }
    try:
        process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return str(error)
    watch = threading.Timer(max(0.5, until - time.monotonic()), kill, (process, signal.SIGINT))
    end = threading.Timer(max(0.5, until - time.monotonic()) + 4.0, kill, (process, signal.SIGKILL))
    watch.start()
    end.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            try:
                results.add(stage=stage, **json.loads(line))
                continue
            except ValueError:
                pass
        results.write(command.file or "log.txt", line)
    code = process.wait()
    watch.cancel()
    end.cancel()
    if time.monotonic() > until - 0.1:
        return "stopped at its limit"
    return "passed" if code == 0 else f"exit code {code}"


def run_stage(stage: Stage, until: float, results: Results) -> bool:
    start = time.monotonic()
    until = min(until, start + stage.seconds)
    left: queue.SimpleQueue[Command] = queue.SimpleQueue()
    for command in stage.commands:
        left.put(command)
    verdicts: list[str] = []

    def work() -> None:
        while time.monotonic() < until - 1.0:
            try:
                command = left.get_nowait()
            except queue.Empty:
                return
            verdicts.append(run_command(command, stage.name, until, results))

    threads = [threading.Thread(target=work) for _ in range(min(stage.at_once, len(stage.commands)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdicts += ["not begun"] * left.qsize()
    spent = time.monotonic() - start
    text = ", ".join(f"{verdicts.count(v)} x {v}" for v in dict.fromkeys(verdicts))
    results.add(stage=stage.name, ended=text, seconds=round(spent, 1))
    results.say(f"== {stage.name}: {text}, {spent:.0f} s")
    return all(v == "passed" for v in verdicts)


# ---- before and after


def output_of(*command: str) -> str:
    """Return the output of a command, or an empty string if it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit(packed: bool) -> str:
    """Return the commit of the pack, or of the checkout."""
    if packed:
        return (PACK / "commit").read_text().strip()
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def unpack(results: Results) -> bool:
    """Unpack the packed libraries if none are built, and tell whether fastloss is such a one."""
    unpacked = False
    for folder, tree in ((PACK, ROOT), (PACK / "beside", PACK / "beside")):
        library, packed = tree / "fastloss" / "_library.so", folder / "_library.so.xz"
        if packed.exists() and not library.exists():
            with lzma.open(packed) as source, open(library, "wb") as target:
                shutil.copyfileobj(source, target)
            results.say(f"unpacked {packed}: {library.stat().st_size / 1e6:.0f} MB")
            unpacked |= tree == ROOT
    return unpacked


def pack(beside: Path | None) -> int:
    """Pack for a machine with a GPU: the compressed library, a second tree to compare with, peers."""
    PACK.mkdir(exist_ok=True)
    (PACK / "commit").write_text(commit(packed=False))
    trees = {PACK: ROOT} | ({PACK / "beside": beside} if beside else {})
    for folder, tree in trees.items():
        library = tree / "fastloss" / "_library.so"
        if not library.exists():
            print(f"{library} is not built", file=sys.stderr)
            return 1
        if folder is not PACK:
            shutil.copytree(
                tree / "fastloss",
                folder / "fastloss",
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("*.so", "__pycache__"),
            )
        data = lzma.compress(library.read_bytes(), preset=6)
        (folder / "_library.so.xz").write_bytes(data)
        print(f"{folder / '_library.so.xz'}: {len(data) / 1e6:.1f} MB", flush=True)
    peers = ("liger-kernel", "cut-cross-entropy", "memeff", "inf-cl")  # pure Python
    target = ("--target", str(PACK / "peers"), "--upgrade", "--no-deps", "--quiet")
    return subprocess.run([sys.executable, "-m", "pip", "install", *target, *peers]).returncode


def write_report(folder: Path) -> None:
    """Write report.md from results.jsonl; the file that does it is run by its path, as fastloss may not load here."""
    made = runpy.run_path(str(ROOT / "fastloss" / "_cli" / "gpu_report.py"))
    (folder / "report.md").write_text(made["markdown"](made["read"](folder)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-out", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything; default: 540")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--stages", help="comma-separated; default: all")
    parser.add_argument("--beside", metavar="FOLDER", help="folder of another fastloss, timed for comparison")
    parser.add_argument("--note", default="", help="a sentence for the report")
    parser.add_argument("--pack", action="store_true", help="only make gpu-pack, which travels to the GPU")
    args = parser.parse_args()
    if args.pack:
        return pack(Path(args.beside) if args.beside else None)

    until = time.monotonic() + args.seconds - 5.0
    results = Results(args.out)
    started = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "note": args.note}
    started |= {
        "card": output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "commit": commit(packed=unpack(results)),
    }
    results.add(stage="start", device=args.device, **started)
    good = True
    for stage in stages(args):
        if time.monotonic() > until - 5.0:
            results.say(f"== {stage.name}: no time left")
            good = False
            continue
        good &= run_stage(stage, until, results)
        write_report(args.out)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
