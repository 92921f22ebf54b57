"""Hash value and gradients of every case of the registry, to show that a change keeps results bitwise identical.

    python tests/hash_registry.py --out before.json          # then change, rebuild
    python tests/hash_registry.py --out after.json
    python tests/hash_registry.py --compare before.json after.json

Hashes every loss, case and dtype at a few shapes of its registry entry, with an upstream gradient other than 1 and with
1 (the gradients made in forward), in one process for each `FASTLOSS_CPU_CAPABILITY` that this machine has, and with
`--simt` the CUDA kernels executed on the CPU. The hash of a call covers dtype, shape and every bit.
`--compare` lists what differs and what only one side has, and exits with 1 if a hash differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

CAPABILITIES = ("sse2", "avx2", "avx512", "amx")
HERE = Path(__file__).resolve().parent


def hash_all(simt: bool, names: list[str]) -> dict[str, str]:
    import torch

    from fastloss._registry import InputSampler, entries
    from fastloss._registry.accuracy import DTYPES, evaluate, name_of

    def digest(x: torch.Tensor) -> str:
        raw = x.detach().contiguous().view(-1)
        raw = raw.view(torch.uint8) if raw.numel() else raw
        return hashlib.sha256(f"{x.dtype}{tuple(x.shape)}".encode() + bytes(raw.numpy())).hexdigest()[:16]

    def one(entry, case: str, dtype: torch.dtype, shape: tuple[int, ...], unit: bool) -> str:
        torch.manual_seed(0)
        kwargs = entry.call(case, InputSampler(dtype, "cpu", 1), shape)
        answer = evaluate(entry.function, kwargs, entry.wrt, torch.ones(()) if unit else None)
        return hashlib.sha256(" ".join(digest(x) for _, x in answer.parts()).encode()).hexdigest()[:16]

    found: dict[str, str] = {}
    for entry in entries(*names):
        shapes = sorted((s for s in entry.shapes if entry.work(s) <= 1 << 17), key=entry.work)
        shapes = list(dict.fromkeys([shapes[0], shapes[len(shapes) // 2], shapes[-1]]))
        for case in entry.cases:
            for dtype in DTYPES:
                for shape in shapes:
                    for unit in (False, True):
                        size, upstream = "x".join(map(str, shape)), "1" if unit else "g"
                        key = f"{entry.name}/{case}/{name_of(dtype)}/{size}/{upstream}"
                        try:
                            found[key] = one(entry, case, dtype, shape, unit)
                        except Exception as error:  # what it raises is its result
                            found[key] = f"{type(error).__name__}: {error}"[:200]
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def worker(names: list[str], simt: bool) -> None:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    with ExitStack() as stack:
        if simt:
            from cuda_on_cpu import build

            from fastloss._ops import autograd

            stack.enter_context(autograd.use_namespace(build.load("plain")))
        json.dump(hash_all(simt, names), sys.stdout)


def run(names: list[str], simt: bool) -> dict[str, str]:
    everything: dict[str, str] = {}
    flags = {"amx": "amx_bf16", "avx512": "avx512f", "avx2": "avx2", "sse2": "sse2"}
    cpuinfo = Path("/proc/cpuinfo").read_text().split()
    wanted = [c for c in CAPABILITIES if flags[c] in cpuinfo] + ["simt"] * simt
    running = {}
    for where in wanted:
        env = dict(os.environ)
        if where != "simt":
            env["FASTLOSS_CPU_CAPABILITY"] = where
        command = [sys.executable, __file__, "--worker", where, *names]
        running[where] = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    for where, process in running.items():
        out, _ = process.communicate()
        if process.returncode:
            sys.exit(f"hashing on {where} failed")
        everything |= {f"{where}/{key}": value for key, value in json.loads(out).items()}
    return everything


def compare(before: dict[str, str], after: dict[str, str]) -> int:
    differ = sorted(k for k in before.keys() & after.keys() if before[k] != after[k])
    for title, keys in (
        ("differ", differ),
        ("only before", sorted(before.keys() - after.keys())),
        ("only after", sorted(after.keys() - before.keys())),
    ):
        groups: dict[str, int] = {}
        for key in keys:
            where, loss, case, *_ = key.split("/")
            name = f"{where} {loss} {case}"
            groups[name] = groups.get(name, 0) + 1
        print(f"{title}: {len(keys)}")
        for name, count in groups.items():
            print(f"  {name}: {count}")
    print(f"{len(before.keys() & after.keys()) - len(differ)} hashes are the same")
    return 1 if differ else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="losses; default: all")
    parser.add_argument("--out", type=Path, help="where to write the hashes, as JSON")
    parser.add_argument("--simt", action="store_true", help="also the CUDA kernels executed on the CPU")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.names, args.worker == "simt")
    if args.compare:
        sys.exit(compare(*(json.loads(path.read_text()) for path in args.compare)))
    if args.out is None:
        parser.error("--out: where to write the hashes")
    hashes = run(args.names, args.simt)
    args.out.write_text(json.dumps(hashes, indent=0, sort_keys=True))
    print(f"{len(hashes)} hashes")


if __name__ == "__main__":
    main()
