"""Other projects' losses as candidates for `python -m fastloss bench ... --peers benchmarks/peers.py`.

`peers(loss, device)` gives those that are installed, with the arguments of fastloss's function by name. What
a peer lacks raises, and `bench` then reports that it was not timed; nothing is compared on unequal terms.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

Function = Callable[..., Tensor]


def liger_cross_entropy() -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def quack_cross_entropy() -> Function:
    from quack.cross_entropy import cross_entropy

    return lambda input, target, **options: cross_entropy(input, target, **options)


def flash_attn_cross_entropy() -> Function:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def mean(input: Tensor, target: Tensor, ignore_index: int = -100, **options: float) -> Tensor:
        per_row, _ = cross_entropy_loss(input, target, ignore_index=ignore_index, **options)
        return per_row.sum() / (target != ignore_index).sum()

    return mean


# loss -> label -> (module that must be there, where it runs, how to get it)
PROVIDERS: dict[str, dict[str, tuple[str, str, Callable[[], Function]]]] = {
    "cross_entropy": {
        "Liger": ("liger_kernel", "cuda", liger_cross_entropy),
        "QuACK": ("quack", "cuda", quack_cross_entropy),
        "flash-attn": ("flash_attn", "cuda", flash_attn_cross_entropy),
    },
}


def peers(loss: str, device: str) -> dict[str, Function]:
    """The installed peers of a loss, by label."""
    return {
        label: load()
        for label, (module, where, load) in PROVIDERS.get(loss, {}).items()
        if where == device and find_spec(module)
    }
