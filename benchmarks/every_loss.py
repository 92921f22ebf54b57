"""Run every loss on small inputs, forward and backward, and nothing else: for compute-sanitizer.

The first case in every registered shape, so that each way in which a kernel divides a row among threads is taken, and
the other cases in the largest; of some losses rows that are longer than what a multiprocessor keeps of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch

from fastloss._registry import InputSampler, Loss, entries
from fastloss._registry.accuracy import evaluate

DTYPES = (torch.float32, torch.bfloat16)
LONG = dict.fromkeys(
    ("cross_entropy", "softmax_focal_loss", "cross_entropy_with_number_token_loss"), (140, 140_000)
)
"""560 and 280 KB a row, more rows than a GPU takes at once."""


def calls(loss: Loss) -> Iterator[tuple[str, tuple[int, ...]]]:
    first, *others = loss.cases
    yield from ((first, shape) for shape in loss.shapes)
    yield from ((case, max(loss.shapes, key=math.prod)) for case in others)
    if loss.name in LONG:
        yield first, LONG[loss.name]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    done = 0
    for loss in entries():
        for case, shape in calls(loss):
            for dtype in DTYPES:
                evaluate(loss.function, loss.call(case, InputSampler(dtype, device), shape), loss.wrt)
                done += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{done} calls of {len(entries())} functions")


if __name__ == "__main__":
    main()
