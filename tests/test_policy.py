"""Policy heads beside their formulas as TRL and verl write them, aggregation, and the awkward points."""

from __future__ import annotations

import math

import pytest
import torch
from support import DTYPES, dtype_id
from torch.autograd import grad

import fastloss.functional as FL
import fastloss.reference as R
from fastloss._registry import Draw

LOW, HIGH = 0.2, 0.28


def tokens(dtype=torch.float64, shape=(5, 23), device="cpu", spread=0.4):
    draw = Draw(dtype, device, 3)
    logps = draw.uniform(*shape, low=-4.0, high=-0.1)
    old, ref = (logps + draw.normal(*shape, scale=spread) for _ in range(2))
    mask = draw.index(4, *shape) > 0
    mask[1] = False
    return logps.requires_grad_(), old, draw.normal(*shape), ref, mask


def clip(rho):
    return rho.clamp(1 - LOW, 1 + HIGH)


def mean(x, mask):
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def gspo(lp, old, a, mask):
    rho = (lp - lp.detach() + mean(lp - old, mask).detach()).exp()
    return -torch.min(rho * a, clip(rho) * a)


def vespo(lp, old, a, mask):
    log_w = ((lp - old).clamp(-20, 20) * mask).sum(-1, keepdim=True)
    k, rate = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
    return -(rate + k * log_w - rate * log_w.exp()).exp().detach() * a * lp


def sapo(lp, old, a, mask):
    t = torch.where(a > 0, torch.full_like(a, 1.0), torch.full_like(a, 1.05))
    return -(4 / t) * torch.sigmoid(t * ((lp - old).exp() - 1)) * a


FORMULAS = {
    "ppo": lambda lp, old, a, m: -torch.min((lp - old).exp() * a, clip((lp - old).exp()) * a),
    "gspo": gspo,
    "cispo": lambda lp, old, a, m: -clip((lp - old).exp()).detach() * a * lp,
    "sapo": sapo,
    "vespo": vespo,
    "gpg": lambda lp, old, a, m: -lp * a,
    "dro": lambda lp, old, a, m: -(lp * a - 0.5 * 0.7 * (lp - old) ** 2),
}
KLS = {
    "none": lambda y: 0 * y,
    "k1": lambda y: -y,
    "k2": lambda y: 0.5 * y**2,
    "k3": lambda y: y.exp() - y - 1,
    "abs": lambda y: y.abs(),
}


@pytest.mark.parametrize("kl", [*KLS, "k1+", "k3+"])
@pytest.mark.parametrize("kind", FORMULAS)
def test_types_and_divergences(kind, kl, device):
    lp, old, a, ref, mask = tokens(device=device)
    y = ref - lp
    k2 = KLS["k2"](y)
    term = k2 + (KLS[kl[:2]](y) - k2).detach() if kl.endswith("+") else KLS[kl](y)
    wanted = (FORMULAS[kind](lp, old, a, mask) + 0.3 * term) * mask
    got = FL.policy_loss(
        lp, old, a, mask, kind, "none", clip_low=LOW, clip_high=HIGH, dro_beta=0.7, ref_logps=ref, kl_coef=0.3,
        kl_type=kl,
    )  # fmt: skip
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    up = torch.cos(wanted.detach())
    torch.testing.assert_close(grad(got, lp, up)[0], grad(wanted, lp, up)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["ppo", "sapo", "gpg"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_first_step_on_policy(kind, dtype, device):
    """Every ratio is 1: the gradient is -A exactly, both branches of the clip being equal."""
    lp, _, a, _, _ = tokens(dtype, device=device)
    options = {"sapo_temperature_neg": 1.0} if kind == "sapo" else {}
    loss = FL.policy_loss(lp, lp.detach(), a, None, kind, "token-sum", **options)
    assert torch.equal(grad(loss, lp)[0], -a)


def test_dual_clip_delta_and_exponent_clamp(device):
    lp = torch.tensor([0.0, 2.0, 3.0, 200.0], device=device).requires_grad_()
    old, a = torch.zeros_like(lp), torch.tensor([-1.0, -1.0, 1.0, -1.0], device=device)
    loss = FL.policy_loss(lp, old, a, None, "ppo", "none", dual_clip=3.0)
    assert loss.tolist() == pytest.approx([1.0, 3.0, -1.2, 3.0])
    assert grad(loss.sum(), lp)[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    loss = FL.policy_loss(lp, old, a, None, "ppo", "none", delta=4.0)
    assert loss.tolist() == pytest.approx([1.0, 4.0, -1.2, 4.0])
    assert grad(loss.sum(), lp)[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    loss = FL.policy_loss(lp, old, a, None, "ppo", "none", log_ratio_clamp=20.0)
    assert loss[3].item() == pytest.approx(math.exp(20.0), rel=1e-5)
    assert grad(loss.sum(), lp)[0][3] == 0


def aggregate(loss, mask, mode):
    total, length = (loss * mask).sum(-1), mask.sum(-1)
    some = (length > 0).sum().clamp(min=1)
    return {
        "token-mean": total.sum() / length.sum().clamp(min=1),
        "token-sum": total.sum(),
        "seq-mean-token-mean": (total / length.clamp(min=1)).sum() / some,
        "seq-mean-token-sum": total.sum() / some,
        "seq-mean-token-sum-norm": total.sum() / mask.numel(),
    }[mode]


MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@pytest.mark.parametrize("mode", MODES)
def test_aggregation(mode, device):
    lp, old, a, _, mask = tokens(device=device)
    per_token = FORMULAS["gpg"](lp, old, a, mask)
    got = FL.policy_loss(lp, old, a, mask, "gpg", mode)
    torch.testing.assert_close(got, aggregate(per_token, mask, mode))
    torch.testing.assert_close(
        FL.value_loss(lp, old, None, mask, None, mode), aggregate(0.5 * (lp - old) ** 2, mask, mode)
    )
    if mode == "token-mean":
        total = FL.policy_loss(lp, old, a, mask, "gpg", mode, normalizer=torch.tensor(17.0, device=device))
        torch.testing.assert_close(total, (per_token * mask).sum() / 17)
    if mode == "seq-mean-token-sum-norm":
        half = FL.policy_loss(lp, old, a, mask, "gpg", mode, horizon=2 * mask.shape[-1])
        torch.testing.assert_close(half, got / 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FORMULAS)
def test_nothing_left_by_the_mask(kind, mode, device):
    """Zero, differentiable, and no trace of what the masked tokens hold."""
    lp = torch.full((2, 3), torch.nan, requires_grad=True, device=device)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    loss = FL.policy_loss(lp, lp.detach(), torch.ones_like(lp), mask, kind, mode)
    assert loss.item() == 0
    assert torch.equal(grad(loss, lp)[0], torch.zeros_like(lp))


def test_one_advantage_for_an_answer_entropies_and_metrics(device):
    lp, old, a, _, mask = tokens(device=device)
    h = a.abs().requires_grad_()
    loss, metrics = FL.policy_loss(
        lp, old, a[:, 0], mask, "grpo", entropies=h, entropy_coef=0.1, return_metrics=True
    )
    wide = a[:, :1].expand_as(a)
    rho = (lp - old).exp()
    per_token = -torch.min(rho * wide, rho.clamp(0.8, 1.2) * wide) - 0.1 * h
    wanted = aggregate(per_token, mask, "seq-mean-token-mean")
    torch.testing.assert_close(loss, wanted)
    for x, y in zip(grad(loss, (lp, h)), grad(wanted, (lp, h)), strict=True):
        torch.testing.assert_close(x, y)
    clipped = torch.where(wide >= 0, rho > 1.2, rho < 0.8)
    torch.testing.assert_close(
        metrics["clip_fraction"], (clipped & mask).sum() / mask.sum(), check_dtype=False
    )
    torch.testing.assert_close(metrics["ratio"], (rho * mask).sum() / mask.sum())
    assert not any(m.requires_grad for m in metrics.values())


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"loss_type": "trpo"}, "loss_type"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode"),
        ({"kl_type": "k4"}, "kl_type"),
        ({"loss_type": "gpg", "dual_clip": 3.0}, "dual_clip"),
        ({"horizon": 10}, "horizon"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"normalizer": torch.ones(2)}, "normalizer"),
    ],
)
def test_refuses(more, match):
    with pytest.raises((ValueError, RuntimeError), match=match):
        FL.policy_loss(*[torch.zeros(2, 3)] * 3, **more)


def test_value_clipping(device):
    lp, old, a, _, mask = tokens(device=device)
    clipped = a + (lp - a).clamp(-0.5, 0.5)
    wanted = aggregate(0.5 * torch.max((lp - old) ** 2, (clipped - old) ** 2), mask, "token-mean")
    got = FL.value_loss(lp, old, a, mask, 0.5)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grad(got, lp)[0], grad(wanted, lp)[0])


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages(kind):
    rewards = Draw(torch.float64).normal(8)
    ids = torch.tensor([3, 0, 3, 1, 0, 3, 0, 0])
    got = FL.group_advantages(rewards, ids, kind)
    torch.testing.assert_close(got, R.group_advantages(rewards, ids, kind))
    for g in (0, 1, 3):
        r = rewards[ids == g]
        if len(r) == 1:
            wanted = r * 0
        elif kind == "grpo":
            wanted = (r - r.mean()) / (r.std() + 1e-4)
        else:
            wanted = r - r.mean() if kind == "dr_grpo" else r - (r.sum() - r) / (len(r) - 1)
        torch.testing.assert_close(got[ids == g], wanted)
    same = FL.group_advantages(torch.ones(4, requires_grad=True), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(same, torch.zeros(4))
    same.sum().backward()
