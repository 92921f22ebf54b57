"""Every preference head beside its formula, and where formulas written naively break."""

from __future__ import annotations

import math

import pytest
import torch
from support import DTYPES, dtype_id
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.functional import logsigmoid as lsig

import fastloss.functional as FL
import fastloss.reference as R
from fastloss._registry import InputSampler

BETA, EPS, TAU = 0.3, 0.15, 0.2
sigma = torch.sigmoid

# As the papers and TRL write them, of the log-ratios c and r.
FORMULAS = {
    "sigmoid": lambda c, r: -(1 - EPS) * lsig(BETA * (c - r)) - EPS * lsig(-BETA * (c - r)),
    "hinge": lambda c, r: torch.relu(1 - BETA * (c - r)),
    "ipo": lambda c, r: (c - r - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda c, r: (
        sigma(BETA * (c - r)) * (lsig(BETA * (c - r)) - math.log(1 - EPS))
        + sigma(-BETA * (c - r)) * (lsig(-BETA * (c - r)) - math.log(EPS))
    ),
    "nca_pair": lambda c, r: -lsig(BETA * c) - 0.5 * lsig(-BETA * c) - 0.5 * lsig(-BETA * r),
    "robust": lambda c, r: (-(1 - EPS) * lsig(BETA * (c - r)) + EPS * lsig(-BETA * (c - r))) / (1 - 2 * EPS),
    "bco_pair": lambda c, r: -lsig(BETA * c) - lsig(-BETA * r),
    "sppo_hard": lambda c, r: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "apo_zero": lambda c, r: 1 - sigma(BETA * c) + sigma(BETA * r),
    "apo_down": lambda c, r: sigma(BETA * c) + 1 - sigma(BETA * (c - r)),
    "discopop": lambda c, r: (
        -lsig(BETA * (c - r)) * (1 - sigma(BETA * (c - r) / TAU))
        + (-BETA * (c - r)).exp() * sigma(BETA * (c - r) / TAU)
    ),
}
SMOOTHED = ("sigmoid", "exo_pair", "robust")
MAPS = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - (-x).exp(),
    "js": lambda x: math.log(2) + lsig(x),
    "alpha": lambda x: ((0.3 - 1) * x).exp().sub(1) / (0.3 - 1),
}


def logps(count, dtype=torch.float64, n=37, device="cpu", seed=0):
    draw = InputSampler(dtype, device, seed)
    return [draw.uniform(n, low=-9.0, high=-0.1).requires_grad_() for _ in range(count)]


def options(kind):
    return {"label_smoothing": EPS} if kind in SMOOTHED else {}


@pytest.mark.parametrize("divergence", MAPS)
@pytest.mark.parametrize("kind", FORMULAS)
def test_dpo_types_and_divergences(kind, divergence, device):
    inputs = logps(4, device=device)
    pc, pr, rc, rr = inputs
    wanted = FORMULAS[kind](MAPS[divergence](pc - rc), MAPS[divergence](pr - rr))
    more = {"f_divergence": divergence, "f_alpha": 0.3} if divergence != "reverse_kl" else {}
    got = FL.dpo_loss(
        *inputs, BETA, loss_type=kind, reduction="none", discopop_tau=TAU, **more, **options(kind)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    up = torch.cos(wanted.detach())
    for a, b in zip(grad(got, inputs, up), grad(wanted, inputs, up), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", FORMULAS)
def test_dpo_gradients_of_gradients(kind, device):
    def function(*x):
        return FL.dpo_loss(*x, BETA, loss_type=kind, f_divergence="js", **options(kind))

    inputs = logps(4, n=3, device=device)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", [*FORMULAS, "sft", "sigmoid_norm"])
def test_dpo_far_from_the_reference(kind, dtype, device):
    """Log-ratios up to hundreds: nothing overflows that the formula does not."""
    values = torch.tensor([-800.0, -300.0, -90.0, -20.0, -1.0, -1e-8, 0.0], dtype=dtype, device=device)
    pc, rc = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    inputs = [x.clone().requires_grad_() for x in (pc, rc, rc, rc.flip(0))]
    more = {"chosen_lengths": 1 - values.repeat(7), "rejected_lengths": 2 - values.repeat(7)}
    more = more if kind == "sigmoid_norm" else options(kind)
    got = FL.dpo_loss(*inputs, BETA, loss_type=kind, reduction="none", **more)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = R.dpo_loss(*wide, BETA, loss_type=kind, reduction="none", **more)
    fits = wanted.detach().to(dtype).isfinite()  # squares of hundreds are too large for float16
    assert got[fits].isfinite().all()
    close = {"rtol": 4e-3 if dtype != torch.float16 else 1e-3, "atol": 2e-2} if dtype.itemsize == 2 else {}
    if kind == "sigmoid_norm" and dtype.itemsize == 2:
        close = {"rtol": 5e-2, "atol": 5e-2}  # quotients are rounded before the head
    torch.testing.assert_close(got.double()[fits], wanted[fits], **(close or {"rtol": 1e-5, "atol": 1e-6}))
    for a, b in zip(grad(got.sum(), inputs), grad(wanted.sum(), wide, allow_unused=True), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(
            a.double(),
            torch.zeros_like(a).double() if b is None else b,
            **(close or {"rtol": 1e-4, "atol": 1e-6}),
        )


def test_dpo_sorted_types(device):
    pc, pr, rc, rr = inputs = logps(4, device=device)
    delta = (pc - pr).sort()[0] - (rc - rr).sort()[0]
    paired = -lsig(BETA * delta)
    torch.testing.assert_close(FL.dpo_loss(*inputs, BETA, loss_type="aot", reduction="none"), paired)
    delta = (pc - rc).sort()[0] - (pr - rr).sort()[0]
    loss = -lsig(BETA * delta) * (1 - EPS) - lsig(-BETA * delta) * EPS
    got = FL.dpo_loss(*inputs, BETA, EPS, loss_type="aot_unpaired")
    torch.testing.assert_close(got, loss.mean())
    for a, b in zip(grad(got, inputs), grad(loss.mean(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_dpo_lengths_and_rewards(device):
    pc, pr, rc, rr = inputs = logps(4, device=device)
    n, m = (InputSampler(torch.float64, device, s).index(20, 37) + 1 for s in (1, 2))
    lengths = {"chosen_lengths": n, "rejected_lengths": m}
    normed = -lsig(BETA * ((pc - rc) / n - (pr - rr) / m)).mean()
    torch.testing.assert_close(FL.dpo_loss(*inputs, BETA, loss_type="sigmoid_norm", **lengths), normed)
    sft = FL.dpo_loss(*inputs, loss_type="sft", chosen_lengths=n)
    torch.testing.assert_close(sft, -(pc / n).mean())
    loss, chosen, rejected = FL.dpo_loss(*inputs, BETA, return_rewards=True)
    torch.testing.assert_close(loss, FL.dpo_loss(*inputs, BETA))
    torch.testing.assert_close(chosen, BETA * (pc - rc).detach())
    torch.testing.assert_close(rejected, BETA * (pr - rr).detach())
    assert not chosen.requires_grad and not rejected.requires_grad


def test_dpo_known_value():
    """Policy equal to the reference: log 2, and gradients of beta / 2."""
    x = torch.tensor([-3.0], requires_grad=True)
    loss = FL.dpo_loss(x, x.detach(), x.detach(), x.detach(), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert x.grad.item() == pytest.approx(-0.05)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"loss_type": "dpo"}, "loss_type"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "exo_pair"}, "label_smoothing"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": "sigmoid_norm"}, "chosen_lengths"),
        ({"chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(3)}, "chosen_lengths"),
        ({"f_divergence": "tv"}, "f_divergence"),
        ({"beta": 0.0}, "beta"),
        ({"reduction": "batchmean"}, "reduction"),
        ({"loss_weights": [1.0]}, "loss_weights"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
        ({"loss_type": []}, "loss_weights"),
        ({"loss_type": ["hinge", "sft"], "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "aot", "weight": torch.ones(3)}, "weight"),
    ],
)
def test_dpo_refuses(more, match):
    with pytest.raises(ValueError, match=match):
        FL.dpo_loss(*[torch.zeros(3)] * 4, **more)


def test_exponent_clamp_bounds_the_divergence():
    x = torch.tensor([-500.0], requires_grad=True)
    zero = torch.zeros(1)
    loss = FL.dpo_loss(x, zero, zero, zero, f_divergence="forward_kl", exponent_clamp=80.0)
    assert loss.isfinite()
    assert grad(loss, x)[0].item() == 0


def test_kto_pulls_the_right_way(device):
    """Descent raises the log-probability of what is desirable and lowers the other's."""
    lp = torch.tensor([-2.0, -2.0], requires_grad=True, device=device)
    ref = torch.tensor([-2.5, -1.0], device=device)
    labels, kl = torch.tensor([True, False], device=device), torch.tensor(0.2, device=device)
    loss = FL.kto_loss(lp, ref, labels, kl, 0.5, "none", desirable_weight=1.25, undesirable_weight=0.5)
    x = lp.detach() - ref - kl
    torch.testing.assert_close(loss[0], 1.25 * (1 - sigma(0.5 * x[0])), check_dtype=False)
    torch.testing.assert_close(loss[1], 0.5 * (1 - sigma(-0.5 * x[1])), check_dtype=False)
    g = grad(loss.sum(), lp)[0]
    assert g[0] < 0 < g[1]


TINY = (-1e-30, -1e-8, -1e-3, -0.7, -5.0, -60.0, -300.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_orpo_at_certain_and_impossible_answers(dtype, device):
    values = torch.tensor(TINY, dtype=dtype, device=device)
    c, r = (x.flatten().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    got = FL.orpo_loss(c, r, beta=0.5, reduction="none")
    c64, r64 = (x.detach().double().requires_grad_() for x in (c, r))
    wanted = R.orpo_loss(c64, r64, beta=0.5, reduction="none")
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    dc, dr = grad(got.sum(), (c, r))
    # d/dc = -beta e^r / (e^c (1 - e^r) + e^r (1 - e^c)) - 1, in float64 with e^(r - c)
    ratio, not_c, not_r = (r64 - c64).exp(), -torch.expm1(c64), -torch.expm1(r64)
    exact = -0.5 * ratio / (not_r + ratio * not_c) - 1
    exact = torch.where(ratio.isinf(), -0.5 / not_c - 1, exact).detach()
    torch.testing.assert_close(dc.double(), exact, rtol=1e-5, atol=1e-6)
    assert dr.isfinite().all()


def test_alpha_po_where_the_probability_underflows(device):
    c = torch.tensor([-120.0], requires_grad=True, device=device)
    r = torch.tensor([-120.5], requires_grad=True, device=device)
    loss = FL.alpha_po_loss(c, r, alpha=0.25, beta=1e-13, gamma=0.0)
    assert loss.isfinite() and all(g.isfinite().all() for g in grad(loss, (c, r)))
    reward = -torch.expm1(-0.25 * torch.tensor([-120.0, -120.5]).double()) / 0.25
    assert reward[0].item() == pytest.approx(-4.27e13, rel=2e-3)
    wanted = -lsig(1e-13 * (reward[0] - reward[1]))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    torch.testing.assert_close(FL.alpha_po_loss(c, r, alpha=0.0), FL.simpo_loss(c, r))


def test_simpo_cpo_orpo_bradley_terry_formulas(device):
    c, r, nll = logps(3, device=device)
    torch.testing.assert_close(FL.simpo_loss(c, r, 2.0, 0.5), -lsig(2.0 * (c - r - 0.25)).mean())
    torch.testing.assert_close(FL.cpo_loss(c, r, nll, 0.2, 0.7), (-lsig(0.2 * (c - r)) + 0.7 * nll).mean())
    odds = (c - r) - (torch.log1p(-c.exp()) - torch.log1p(-r.exp()))
    torch.testing.assert_close(FL.orpo_loss(c, r, nll, 0.2), (nll - 0.2 * lsig(odds)).mean())
    torch.testing.assert_close(FL.orpo_loss(c, r, beta=0.2), (-c - 0.2 * lsig(odds)).mean())
    torch.testing.assert_close(
        FL.bradley_terry_loss(c, r, nll, center_coefficient=0.1),
        (-lsig(c - r - nll) + 0.1 * (c + r) ** 2).mean(),
    )


def test_weight_zero_leaves_a_pair_out(device):
    c = torch.tensor([1.0, float("nan")], requires_grad=True, device=device)
    loss = FL.bradley_terry_loss(c, torch.zeros_like(c), weight=torch.tensor([2.0, 0.0], device=device))
    assert loss.item() == pytest.approx(-lsig(torch.tensor(1.0)).item())
    assert grad(loss, c)[0][1] == 0


def test_dpo_types_add_up_with_their_weights(device):
    inputs = logps(4, device=device)
    lengths = {
        n: InputSampler(torch.float64, device, 1).index(20, 37) + 1
        for n in ("chosen_lengths", "rejected_lengths")
    }
    weight = InputSampler(torch.float64, device, 2).uniform(37)
    mixed = FL.dpo_loss(
        *inputs,
        BETA,
        EPS,
        ["sigmoid", "bco_pair", "sft"],
        "none",
        loss_weights=[0.8, 0.2, 1.0],
        weight=weight,
        **lengths,
    )
    c, r = inputs[0] - inputs[2], inputs[1] - inputs[3]
    each = FORMULAS["sigmoid"](c, r), FORMULAS["bco_pair"](c, r), -inputs[0] / lengths["chosen_lengths"]
    wanted = weight * (0.8 * each[0] + 0.2 * each[1] + each[2])
    torch.testing.assert_close(mixed, wanted)
    for a, b in zip(grad(mixed.sum(), inputs), grad(wanted.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)
    plain = FL.dpo_loss(*inputs, BETA, loss_type=("hinge", "sppo_hard"))
    torch.testing.assert_close(
        plain, sum(FL.dpo_loss(*inputs, BETA, loss_type=k) for k in ("hinge", "sppo_hard"))
    )


def answers(dtype=torch.float64, device="cpu", shape=(6, 5, 11)):
    """Logits, chosen answers first, labels of which the last pair has none, and reference log-probabilities."""
    draw = InputSampler(dtype, device, 4)
    logits, labels = draw.normal(*shape, scale=2.0), draw.index(shape[-1], *shape[:-1])
    labels[0, 3:] = labels[4, :2] = labels[2] = labels[5] = -100
    return logits.requires_grad_(), labels, draw.normal(3) - 9, draw.normal(3) - 9


@pytest.mark.parametrize("kind", [*FORMULAS, "sigmoid_norm", "sft", "aot"])
def test_dpo_from_logits(kind, device):
    logits, labels, rc, rr = answers(device=device)
    mask = labels != -100
    every = logits.log_softmax(-1)
    tokens = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * mask
    (pc, pr), (n, m) = tokens.sum(-1).chunk(2), mask.sum(-1).clamp(min=1).chunk(2)
    lengths = {"chosen_lengths": n, "rejected_lengths": m} if kind in ("ipo", "sigmoid_norm", "sft") else {}
    wanted, *rewards = FL.dpo_loss(
        pc, pr, rc, rr, BETA, loss_type=kind, return_rewards=True, **lengths, **options(kind)
    )
    got, *mine = FL.dpo_loss_from_logits(
        logits, labels, rc, rr, BETA, loss_type=kind, return_rewards=True, **options(kind)
    )
    torch.testing.assert_close([got, *mine], [wanted, *rewards])
    (dx,) = grad(got, logits)
    torch.testing.assert_close(dx, grad(wanted, logits)[0])
    assert (dx[~mask] == 0).all()


def test_dpo_from_logits_weighting_and_shorter_tails(device):
    logits, labels, rc, rr = answers(device=device)
    mask = labels != -100
    every = logits.log_softmax(-1)
    tokens = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * mask
    own = ((tokens - (2 * every).logsumexp(-1)) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    weight = (own[:3] + own[3:]).exp().clamp(max=1).detach()
    (pc, pr) = tokens.sum(-1).chunk(2)
    wanted = (weight * FL.dpo_loss(pc, pr, rc, rr, BETA, reduction="none")).mean()
    got = FL.dpo_loss_from_logits(logits, labels, rc, rr, BETA, use_weighting=True)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grad(got, logits)[0], grad(wanted, logits, retain_graph=True)[0])
    # pair 0 has 3 tokens against 5, pair 1 has 5 against 3, pair 2 has none against none
    tails = torch.ones(6, 5, dtype=torch.float64, device=tokens.device)
    tails[3, 3:] = tails[1, 3:] = 0.25
    pc, pr = (tokens * tails).sum(-1).chunk(2)
    got = FL.dpo_loss_from_logits(logits, labels, rc, rr, BETA, ld_alpha=0.25)
    torch.testing.assert_close(got, FL.dpo_loss(pc, pr, rc, rr, BETA))


def test_dpo_from_logits_of_nothing_but_prompts(device):
    """All labels ignored: the policy says what the reference said, and nothing moves, whatever the logits hold."""
    logits = torch.full((4, 3, 7), math.nan, device=device, requires_grad=True)
    labels = torch.full((4, 3), -100, device=device)
    zero = torch.zeros(2, device=device)
    for kind in ("sigmoid", "ipo", "sft"):
        loss = FL.dpo_loss_from_logits(logits, labels, zero, zero, loss_type=kind, use_weighting=True)
        assert loss.isfinite()
        assert torch.equal(grad(loss, logits)[0], torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"policy_logits": torch.zeros(3, 2, 5)}, "policy_logits"),
        ({"policy_logits": torch.zeros(4, 5)}, "policy_logits"),
        ({"labels": torch.zeros(4, 3, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(4, 2)}, "labels"),
        ({"labels": torch.full((4, 2), 5)}, "labels: .*out of bounds"),
        ({"reference_chosen_logps": torch.zeros(4)}, "reference_chosen_logps"),
        ({"ld_alpha": 1.5}, "ld_alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"loss_type": "simpo"}, "loss_type"),
    ],
)
def test_dpo_from_logits_refuses(change, match):
    valid = {
        "policy_logits": torch.zeros(4, 2, 5), "labels": torch.zeros(4, 2, dtype=torch.int64),
        "reference_chosen_logps": torch.zeros(2), "reference_rejected_logps": torch.zeros(2),
    }  # fmt: skip
    with pytest.raises((ValueError, RuntimeError, IndexError), match=match):
        FL.dpo_loss_from_logits(**valid | change)


def test_heads_of_log_probabilities_next_to_zero(device):
    """-1e-30 and -1e-8 beside likely and impossible answers: finite, value and gradient."""
    values = torch.tensor(TINY, device=device)
    c, r = (x.flatten().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    ref = torch.full_like(c, -1.0).detach()
    heads = {
        "simpo": lambda: FL.simpo_loss(c, r),
        "cpo": lambda: FL.cpo_loss(c, r, -c.detach()),
        "alpha_po": lambda: FL.alpha_po_loss(c, r, beta=1e-3),
        "orpo": lambda: FL.orpo_loss(c, r),
        "kto": lambda: FL.kto_loss(c, r.detach(), r > c),
        "dpo": lambda: FL.dpo_loss(c, r, ref, ref),
    }
    for name, loss in heads.items():
        value = loss()
        assert value.isfinite(), name
        assert all(g.isfinite().all() for g in grad(value, (c, r), allow_unused=True) if g is not None), name
