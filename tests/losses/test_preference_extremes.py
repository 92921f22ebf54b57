"""Preference heads of NaN, of answers without probability, and far from zero."""

from __future__ import annotations

import math

import pytest
import torch
from support import DTYPES, dtype_id
from torch.autograd import grad

import fastloss.functional as FL
import fastloss.reference as R

BETA = 0.3


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_hinge_of_nan_is_nan(dtype, device):
    """A broken forward pass does not look like a solved pair."""
    nan, one = (torch.tensor([v], dtype=dtype) for v in (math.nan, -1.0))
    for loss in (
        lambda x: FL.dpo_loss(x, one, one, one, loss_type="hinge"),
        lambda x: FL.simpo_loss(x, one, loss_type="hinge"),
        lambda x: FL.cpo_loss(x, one, loss_type="hinge"),
        lambda x: FL.hinge_loss(x, one),
    ):
        x = nan.clone().requires_grad_()
        value = loss(x)
        assert value.isnan()
        assert grad(value, x)[0] != 0  # as of torch.relu: not a pair that is solved


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha", "js"])
@pytest.mark.parametrize("clamp", [None, 5.0])
def test_divergence_of_nan_is_nan(divergence, clamp, device):
    one, x = torch.tensor([-1.0]), torch.tensor([math.nan], requires_grad=True)
    more = {} if divergence == "js" else {"exponent_clamp": clamp}
    value = FL.dpo_loss(x, one, one, one, f_divergence=divergence, **more)
    assert value.isnan()
    assert grad(value, x)[0].isnan()


IMPOSSIBLE = {
    "sigmoid": 0.0,
    "hinge": 0.0,
    "exo_pair": -math.log(0.9),
    "robust": 0.0,
    "bco_pair": math.log(2),
    "nca_pair": 1.5 * math.log(2),
    "apo_zero": 0.5,
    "discopop": 0.0,
}
"""Of a rejected answer without probability, where the chosen one is as probable as in the reference model."""


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_impossible_rejected_answer(kind, dtype, device):
    """Terms that are off, or tend to 0, are no 0 * infinity: the loss and the gradients are finite."""
    one = -torch.ones(1, dtype=dtype)
    c, r = (torch.tensor([v], dtype=dtype).requires_grad_() for v in (-1.0, -math.inf))
    smoothing = 0.1 if kind == "exo_pair" else 0.0
    for function in (FL.dpo_loss, R.dpo_loss):
        value = function(c, r, one, one, BETA, smoothing, kind)
        torch.testing.assert_close(value, torch.tensor(IMPOSSIBLE[kind], dtype=dtype))
    for g in grad(FL.dpo_loss(c, r, one, one, BETA, smoothing, kind), (c, r)):
        assert g.isfinite().all()


def test_impossible_rejected_answer_of_other_heads(device):
    c, r = (torch.tensor([v]).requires_grad_() for v in (-1.0, -math.inf))
    for loss in (FL.simpo_loss, R.simpo_loss, FL.cpo_loss, FL.bradley_terry_loss, R.bradley_terry_loss):
        value = loss(c, r)
        assert value == 0
        assert all(g == 0 for g in grad(value, (c, r)))


def test_rewards_that_are_not_centred_may_be_large(device):
    """A coefficient of 0 is no factor of the square of their sum, which overflows."""
    c, r = torch.tensor([1e30], requires_grad=True), torch.tensor([1e30], requires_grad=True)
    value = FL.bradley_terry_loss(c, r)
    assert value.item() == pytest.approx(math.log(2))
    assert [g.item() for g in grad(value, (c, r))] == [-0.5, 0.5]


def test_reference_far_from_zero():
    """The softplus of the references neither stops at 20 nor overflows."""
    zero = torch.zeros(3, dtype=torch.float64)
    u = torch.tensor([30.0, 800.0, -800.0], dtype=torch.float64)
    want = torch.tensor([30 + math.log1p(math.exp(-30)), 800.0, math.exp(-745.0) * 0], dtype=torch.float64)
    got = R.dpo_loss(-u, zero, zero, zero, beta=1.0, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-16, atol=0)
