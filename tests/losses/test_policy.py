"""Policy heads beside their formulas as TRL and verl write them, aggregation, and the awkward points."""

from __future__ import annotations

import math

import pytest
import torch
from support import DTYPES, dtype_id
from support.completions import tokens
from torch.autograd import grad

import fastloss.functional as FL

LOW, HIGH = 0.2, 0.28


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


def topr(lp, old, a, mask):
    w = ((lp - old) * mask).sum(-1, keepdim=True).exp().clamp(max=1)
    return -torch.where(a >= 0, 1.0, w).detach() * a * lp


def geo_mean(lp, old, a, mask):
    a = mean(a, mask)
    change = lp - old
    kept = torch.where(a > 0, change.clamp(max=HIGH), change.clamp(min=-LOW))
    moves = torch.where(a > 0, change <= HIGH, change >= -LOW)
    return -a * (mean(kept, mask).detach() + torch.where(moves, lp - lp.detach(), 0.0)).exp()


def dppo(lp, old, a, divergence):
    p, q = lp.detach().exp(), old.exp()
    if divergence == "tv":
        keep = torch.where(a > 0, p - q <= HIGH, p - q >= -LOW)
    else:
        kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        keep = torch.where(a > 0, (kl <= HIGH) | (p <= q), (kl <= LOW) | (p >= q))
    return -a * (p / q).clamp(max=20.0) * lp * keep


def sapo(lp, old, a, mask):
    t = torch.where(a > 0, torch.full_like(a, 1.0), torch.full_like(a, 1.05))
    return -(4 / t) * torch.sigmoid(t * ((lp - old).exp() - 1)) * a


FORMULAS = {
    "ppo": lambda lp, old, a, m: -torch.min((lp - old).exp() * a, clip((lp - old).exp()) * a),
    "gspo": gspo,
    "cispo": lambda lp, old, a, m: -clip((lp - old).exp()).detach() * a * lp,
    "sapo": sapo,
    "vespo": vespo,
    "topr": topr,
    "gpg": lambda lp, old, a, m: -lp * a,
    "reinforce": lambda lp, old, a, m: -lp * a,
    "dro": lambda lp, old, a, m: -(lp * a - 0.5 * 0.7 * (lp - old) ** 2),
    "luspo": gspo,
    "geo_mean": geo_mean,
    "dppo_tv": lambda lp, old, a, m: dppo(lp, old, a, "tv"),
    "dppo_kl": lambda lp, old, a, m: dppo(lp, old, a, "kl"),
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


@pytest.mark.parametrize("kind", [k for k in FORMULAS if k != "vespo"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_first_step_on_policy(kind, dtype, device):
    """Every ratio is 1: the gradient is -A exactly, both branches of the clip being equal."""
    lp, _, a, _, _ = tokens(dtype, device=device)
    options = {"sapo_temperature_neg": 1.0} if kind == "sapo" else {}
    given = a[:, 0] if kind == "geo_mean" else a
    loss = FL.policy_loss(lp, lp.detach(), given, None, kind, "token-sum", **options)
    assert torch.equal(grad(loss, lp)[0], -(a[:, :1].expand_as(a) if kind == "geo_mean" else a))


def test_no_exponent_is_bounded_unless_asked(device):
    """l - old = 25: past the 20 that other libraries clamp at without a word."""
    lp = torch.tensor([[-1.0]], dtype=torch.float64, device=device, requires_grad=True)
    old, a = lp.detach() - 25, -torch.ones_like(lp)
    for kind in ("ppo", "gspo", "luspo"):
        loss = FL.policy_loss(lp, old, a, None, kind)
        assert loss.item() == pytest.approx(math.exp(25.0))
        assert grad(loss, lp)[0].item() == pytest.approx(math.exp(25.0))
        assert FL.policy_loss(lp, old, a, None, kind, log_ratio_clamp=20.0).item() == pytest.approx(
            math.exp(20.0)
        )
    kl = FL.policy_loss(lp, lp.detach(), 0 * a, None, "gpg", ref_logps=lp.detach() + 30, kl_coef=1.0)
    assert kl.item() == pytest.approx(math.exp(30.0) - 31)


@pytest.mark.parametrize("kind", [*FORMULAS, "clip_cov", "kl_cov"])
def test_tokens_that_were_certain(kind, device):
    """Log-probabilities down to what rounds to 0, of both policies: value and gradient are finite."""
    values = torch.tensor([-1e-30, -1e-8, -1e-3, -5.0, 0.0], device=device)
    lp, old = (x.clone() for x in torch.meshgrid(values, values, indexing="ij"))
    lp.requires_grad_()
    for sign in (1.0, -1.0):
        loss = FL.policy_loss(lp, old, torch.full_like(old, sign), None, kind, ref_logps=old, kl_coef=0.1)
        assert loss.isfinite() and grad(loss, lp)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_topr_tapers_what_is_not_rewarded(dtype, device):
    """Ratios of answers by hand, to e^-1000 and e^1000: the gradient of a token is -A times the weight."""
    change = torch.tensor([0.0, 0.5, -0.5, -20.0, 20.0, -250.0, 250.0, 1.0], dtype=dtype, device=device)
    old = torch.full((8, 4), -300.0, dtype=dtype, device=device)
    lp = (old + change[:, None]).requires_grad_()
    change = (lp - old).detach()[:, 0]  # as far as half types tell
    mask = torch.ones(8, 4, dtype=torch.bool, device=device)
    mask[-1, 1:] = False
    a = torch.tensor([1.0, -2.0], dtype=dtype, device=device)
    for sign in a:
        given = sign.expand(8)
        loss = FL.policy_loss(lp, old, given, mask, "topr", "token-sum")
        w = torch.exp((4 * change.double()).clamp(max=0)) if sign < 0 else torch.ones(8, device=device)
        wanted = -sign.double() * w[:, None] * mask
        close = {"rtol": 2 * max(torch.finfo(dtype).eps, 1e-7), "atol": torch.finfo(dtype).tiny}
        torch.testing.assert_close(grad(loss, lp)[0].double(), wanted.double(), **close)
    default = FL.policy_loss(lp.double(), old.double(), a[:1].double().expand(8), mask, "topr")
    torch.testing.assert_close(default, -(lp.double() * mask).sum() / 8)
    bounded = FL.policy_loss(
        lp, old, -torch.ones_like(change), mask, "topr", "token-sum", log_ratio_clamp=0.25
    )
    torch.testing.assert_close(grad(bounded, lp)[0][3], torch.full_like(old[0], math.exp(-1.0)))


def test_covariance_types(device):
    """All tokens are candidates and all of these are taken: nothing is left to the draw."""
    lp, old, a, ref, mask = tokens(device=device, spread=0.1)
    options = {"clip_low": LOW, "clip_high": HIGH, "cov_ratio": 1.0, "cov_bounds": (0.1, 0.9)}
    m = mask.to(a.dtype)
    cov = (a - (a * m).sum() / m.sum()) * (lp.detach() - (lp.detach() * m).sum() / m.sum())
    rho = (lp - old).exp()
    clipped = -a * clip(rho) > -a * rho
    left_out = (cov > 0.1) & (cov < 0.9) & ~clipped & mask
    assert left_out.any()
    got = FL.policy_loss(lp, old, a, mask, "clip_cov", "none", **options)
    wanted = -torch.min(rho * a, clip(rho) * a) * mask * ~left_out
    for x, y in zip((got, grad(got.sum(), lp)[0]), (wanted, grad(wanted.sum(), lp)[0]), strict=True):
        torch.testing.assert_close(x, y)

    few = 5 / mask.sum().item() + 1e-9
    chosen = torch.zeros_like(mask)
    chosen.view(-1)[torch.where(mask, cov, -math.inf).flatten().topk(5)[1]] = True
    got = FL.policy_loss(
        lp, old, a, mask, "kl_cov", "none", cov_ratio=few, cov_kl_coef=0.7, ref_logps=ref, kl_coef=0.3
    )
    wanted = (-a * (lp - old).exp() + 0.7 * (lp - old).abs() * chosen + 0.3 * KLS["k3"](ref - lp)) * mask
    for x, y in zip((got, grad(got.sum(), lp)[0]), (wanted, grad(wanted.sum(), lp)[0]), strict=True):
        torch.testing.assert_close(x, y)


def test_clip_cov_draws_as_many_as_asked():
    lp, old, a, _, _ = tokens(shape=(40, 50), spread=0.01)
    options = {"cov_ratio": 0.01, "cov_bounds": (-10.0, 10.0)}

    def left_out(seed):
        generator = torch.Generator().manual_seed(seed)
        return FL.policy_loss(lp, old, a, None, "clip_cov", "none", generator=generator, **options) == 0

    assert left_out(1).sum() == 20
    assert torch.equal(left_out(1), left_out(1)) and not torch.equal(left_out(1), left_out(2))


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
        "seq-mean-token-sum-norm": total.sum() / some / mask.shape[-1],
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
@pytest.mark.parametrize("kind", [*FORMULAS, "clip_cov", "kl_cov"])
def test_nothing_left_by_the_mask(kind, mode, device):
    """Zero, differentiable, and no trace of what the masked tokens hold."""
    lp = torch.full((2, 3), torch.nan, requires_grad=True, device=device)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    loss = FL.policy_loss(lp, lp.detach(), torch.ones_like(lp), mask, kind, mode)
    assert loss.item() == 0
    assert torch.equal(grad(loss, lp)[0], torch.zeros_like(lp))
    loss = FL.value_loss(lp, lp.detach(), None, mask, None, mode)
    assert loss.item() == 0
    assert torch.equal(grad(loss, lp)[0], torch.zeros_like(lp))


def test_flags_weights_and_no_mask_agree(device):
    """A mask as flags, as numbers, of all ones and none: one answer, whichever way it is read."""
    for dtype in (torch.float32, torch.bfloat16):
        lp, old, a, _, mask = tokens(dtype, device=device)
        for mode in (*MODES, "none"):
            for m, same in ((mask, mask.to(dtype)), (torch.ones_like(mask), None)):
                x, y = (FL.policy_loss(lp, old, a, k, "grpo", mode) for k in (m, same))
                torch.testing.assert_close(x, y)
                torch.testing.assert_close(*(grad(v.sum(), lp)[0] for v in (x, y)))


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
        ({"loss_type": "geo_mean", "log_ratio_clamp": 20.0}, "log_ratio_clamp"),
        ({"loss_type": "clip_cov", "cov_ratio": 2.0}, "cov_ratio"),
        ({"horizon": 10}, "horizon"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"normalizer": torch.ones(2)}, "normalizer"),
    ],
)
def test_refuses(more, match):
    with pytest.raises((ValueError, RuntimeError), match=match):
        FL.policy_loss(*[torch.zeros(2, 3)] * 3, **more)


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("name", ["old_logps", "advantages"])
def test_names_what_is_not_given(name, kind):
    given = {n: torch.zeros(2, 3) for n in ("logps", "old_logps", "advantages")}
    with pytest.raises(TypeError, match=name):
        FL.policy_loss(**given | {name: None}, loss_type=kind)


def test_value_clipping(device):
    lp, old, a, _, mask = tokens(device=device)
    clipped = a + (lp - a).clamp(-0.5, 0.5)
    wanted = aggregate(0.5 * torch.max((lp - old) ** 2, (clipped - old) ** 2), mask, "token-mean")
    got = FL.value_loss(lp, old, a, mask, 0.5)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grad(got, lp)[0], grad(wanted, lp)[0])
