"""`python -m fastloss`: build and hardware info, accuracy check, benchmark, profile."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

DTYPES = ("float64", "float32", "bfloat16", "float16")


def shape(text: str) -> tuple[int, ...]:
    """Parse "4096x32000" as (4096, 32000)."""
    try:
        return tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected sizes joined by x, like 4096x32000, not {text!r}"
        ) from None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m fastloss", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="{info,losses,check,bench,profile}")

    info = commands.add_parser("info", help="show build and hardware info")
    info.add_argument("--json", action="store_true", help="print JSON")

    losses = commands.add_parser("losses", help="print the table of losses as Markdown")
    losses.add_argument("--write", type=Path, metavar="FILE", help="replace the table in a Markdown file")

    check = commands.add_parser("check", help="compare every loss with its float64 reference")
    check.add_argument("--loss", action="append", metavar="NAME", help="only this loss; may be repeated")
    check.add_argument("--device", action="append", choices=("cpu", "cuda"), help="default: all available")
    check.add_argument("--seed", type=int, default=0, metavar="N", help="of the inputs; default: 0")
    check.add_argument("--verbose", action="store_true", help="print every comparison")

    bench = commands.add_parser("bench", help="compare a loss with eager PyTorch and torch.compile")
    bench.add_argument("loss", nargs="?", help="name of the loss")
    bench.add_argument("--shape", type=shape, metavar="4096x32000", help="default: the loss's own")
    bench.add_argument("--dtype", choices=DTYPES, help="default: float32; with --all float32 and bfloat16")
    bench.add_argument("--case", help="one of the loss's cases; default: the first")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    bench.add_argument("--forward-only", action="store_true", help="no gradient")
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's")
    bench.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="a candidate to skip; may be repeated",
    )
    bench.add_argument("--rounds", type=int, metavar="N", help="default: as many as the budget allows")
    bench.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="seconds of timing per loss and dtype; default: 20, with --all 5",
    )
    bench.add_argument(
        "--patience",
        type=float,
        metavar="SECONDS",
        dest="max_step_seconds",
        help="skip candidates slower than this per step (12 times during the check); default: none, with --all 5",
    )
    bench.add_argument("--peers", type=Path, metavar="FILE", help="Python file with further candidates")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="plot the times (.png, .svg, .pdf)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    bench.add_argument(
        "--all", action="store_true", help="every loss, with fewer rows than its own; needs --out"
    )
    bench.add_argument(
        "--table", type=Path, metavar="FILE", help="measure the list in a JSON file, like benchmarks/cpu.json"
    )
    bench.add_argument("--out", type=Path, metavar="DIR", help="folder for the report of --all and --table")
    bench.add_argument(
        "--from",
        type=Path,
        metavar="DIR",
        dest="again",
        help="measure nothing: write report and plot from the results in DIR, of --out or of `make gpu`",
    )

    profile = commands.add_parser("profile", help="profile the fastloss calls of a script")
    profile.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot bandwidth over size (.png, .svg, .pdf)"
    )
    profile.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for chrome://tracing")
    profile.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    profile.add_argument("--nvtx", action="store_true", help="mark the calls as NVTX ranges")
    profile.add_argument("script", help="Python file")
    profile.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return top


def main(argv: list[str] | None = None) -> int:
    top = parser()
    args = top.parse_args(argv)
    if args.command == "bench":
        chosen = (args.all, args.table is not None, args.again is not None, args.loss is not None)
        if sum(chosen) != 1:
            top.error("bench takes the name of a loss, or --all, or --table FILE, or --from DIR")
        if (args.all or args.table is not None) != (args.out is not None):
            top.error("--all or --table, and --out DIR go together")
    try:
        return importlib.import_module(f"fastloss._cli.{args.command}").main(args)
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "matplotlib"):
            raise
        print(f"fastloss {args.command} needs {error.name}: pip install 'fastloss[cli]'", file=sys.stderr)
    except (ValueError, FileNotFoundError) as error:
        print(f"fastloss {args.command}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
