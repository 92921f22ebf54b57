"""Run a script, then print what its fastloss calls cost: `python -m fastloss profile SCRIPT ...`."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from fastloss.profiler import profile


def main(args: argparse.Namespace) -> int:
    if args.plot:
        from fastloss._cli import plot  # noqa: F401  before the script runs, not after
    before = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = [args.script, *args.arguments], str(Path(args.script).resolve().parent)
    code: Any = 0
    try:
        with profile(nvtx=args.nvtx) as p:
            runpy.run_path(args.script, run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.argv, sys.path[0] = before
    Console(width=None if sys.stdout.isatty() else 150).print(
        p.table() if p.calls else "no calls of fastloss"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(g) for g in p.groups()], indent=1) + "\n")
    if args.trace:
        p.chrome_trace(args.trace)
    if args.plot and p.calls:
        p.plot(args.plot)
    if isinstance(code, str):
        print(code, file=sys.stderr)
    return code if isinstance(code, int) else int(code is not None)
