"""Several processes of one group, each of which runs the same file: `file meeting rank size`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import fastloss


def run_ranks(file: str, size: int, tmp_path: Path) -> None:
    here = Path(file)
    paths = [str(Path(fastloss.__file__).parents[1]), str(here.parent), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(here), str(tmp_path / "meeting")]
    ranks = [
        subprocess.Popen([*command, str(r), str(size)], env=env, stderr=subprocess.PIPE, text=True)
        for r in range(size)
    ]
    try:
        errors = [p.communicate(timeout=120)[1] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0] * size, "\n".join(errors)


def be_a_rank(work: Callable[[int, int], None]) -> None:
    path, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    work(rank, size)
    dist.destroy_process_group()
