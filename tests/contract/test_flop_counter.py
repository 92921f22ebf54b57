"""`torch.utils.flop_counter.FlopCounterMode` counts the products that the losses run."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import make
from torch.utils.flop_counter import FlopCounterMode

from fastloss import functional, reference
from fastloss._registry import losses

ROWS, FEATURES, CLASSES = 6, 8, 7
PRODUCT = 2 * ROWS * FEATURES * CLASSES
# losses of one matrix of logits or similarities, whose reference multiplies as many times as it has to
OF_ONE_MATRIX = (
    "linear_cross_entropy", "clip_loss", "siglip_loss", "sup_con_loss", "arcface_loss", "cosface_loss",
)  # fmt: skip


def flops(function, *args, **kwargs):
    """Of a call, and of its backward pass if it has one."""
    with FlopCounterMode(display=False) as forward:
        value = function(*args, **kwargs)
    with FlopCounterMode(display=False) as backward:
        if value.requires_grad:
            value.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def hidden(*wanted):
    sizes = {"input": (ROWS, FEATURES), "linear_weight": (CLASSES, FEATURES), "linear_bias": (CLASSES,)}
    return {name: torch.randn(size).requires_grad_(name in wanted) for name, size in sizes.items()}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [c for n in range(4) for c in itertools.combinations(hidden(), n)])
def test_linear_cross_entropy(wanted, reduction):
    """As many as in torch, whatever is differentiated; unreduced, the logits are made a second time for backward."""
    target = torch.arange(ROWS)
    ours = flops(functional.linear_cross_entropy, target=target, **hidden(*wanted), reduction=reduction)
    theirs = flops(reference.linear_cross_entropy, target=target, **hidden(*wanted), reduction=reduction)
    again = PRODUCT if reduction == "none" and wanted else 0
    assert sum(ours) == sum(theirs) + again
    assert sum(ours) == PRODUCT * (1 + len({*wanted} - {"linear_bias"})) + again


@pytest.mark.parametrize("wanted", [(), ("input",), ("linear_weight",), ("input", "linear_weight")])
def test_linear_token_stats(wanted):
    """The logits are made again for backward, not kept."""

    def logp(**kwargs):
        return functional.linear_token_stats(**kwargs).logp

    assert flops(logp, index=torch.arange(ROWS), **hidden(*wanted)) == (
        PRODUCT,
        PRODUCT * (1 + len(wanted)) if wanted else 0,
    )


@pytest.mark.parametrize(
    ("loss", "case"),
    [pytest.param(e, case, id=f"{e.name}-{case}") for e in losses(*OF_ONE_MATRIX) for case in e.cases],
)
def test_products_of_the_reference(loss, case):
    """At most one more than plain PyTorch: the matrix itself, where it is made again and not kept."""
    forward, backward = flops(loss.reference, **make(loss, case, torch.float32))
    assert sum(flops(loss.function, **make(loss, case, torch.float32))) in (
        forward + backward,
        2 * forward + backward,
    )


def test_rows_compared_with_themselves():
    """Both gradients are one product; of pairs, forward goes over the matrix twice."""
    x, labels = torch.randn(ROWS, FEATURES, requires_grad=True), torch.arange(ROWS) // 2
    product = 2 * ROWS * ROWS * FEATURES
    assert flops(functional.sup_con_loss, x, labels) == (product, 2 * product)
    assert flops(functional.pair_nt_xent_loss, x, labels) == (2 * product, 2 * product)
    assert flops(functional.batch_hard_triplet_loss, x, labels) == (product, 0)
    assert flops(functional.nt_xent_loss, x, x.detach()) == (4 * product, 8 * product)
