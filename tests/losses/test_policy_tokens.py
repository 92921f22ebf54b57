"""Which tokens of a policy loss count: masked ones never, NaN always, those of an answer with one ratio together."""

from __future__ import annotations

import math

import pytest
import torch
from support.completions import tokens
from torch.autograd import grad

import fastloss.functional as FL
import fastloss.reference as R
from fastloss._ops.policy import POLICY_TYPES
from fastloss.losses.policy import AGGREGATIONS

KINDS = [*POLICY_TYPES, "value"]
MODES = [mode for mode in AGGREGATIONS if mode != "none"]


@pytest.mark.parametrize("mode", MODES)
def test_answers_without_tokens_are_left_out(mode, device):
    """Of every mean: more of them change nothing."""
    lp, old, a, _, mask = tokens(device=device)
    more = [torch.cat([x, x]) for x in (lp, old, a)]
    padded = torch.cat([mask, torch.zeros_like(mask)])
    for m, p in ((mask, padded), (mask.double() * 0.5, padded.double() * 0.5)):
        for function, short, long in (
            (FL.policy_loss, (lp, old, a, m, "gpg", mode), (*more, p, "gpg", mode)),
            (FL.value_loss, (lp, old, a, m, 0.2, mode), (*more, p, 0.2, mode)),
        ):
            torch.testing.assert_close(function(*short), function(*long))


@pytest.mark.parametrize("kind", ["gspo", "luspo"])
@pytest.mark.parametrize("bound", ["low", "high", "dual", "delta"])
def test_one_ratio_for_an_answer(kind, bound, device):
    """All tokens of an answer are clipped or none is, however large their log-probabilities are beside the bound."""
    generator = torch.Generator().manual_seed(0)
    x = -30 * torch.rand(2000, 7, generator=generator).to(device)
    edge = 3e-4 if bound != "low" else -3e-4
    old = x - edge * (1 + 2e-3 * torch.randn(2000, 1, generator=generator).to(device))
    x.requires_grad_()
    sign = torch.tensor(-1.0 if bound in ("low", "delta") else 1.0, device=device)
    more = {"delta": math.exp(edge)} if bound == "delta" else {}
    loss = FL.policy_loss(
        x,
        old,
        sign.expand(2000),
        None,
        kind,
        "none",
        clip_low=-math.expm1(-3e-4),
        clip_high=math.expm1(3e-4),
        **more,
    )
    moves = grad(loss.sum(), x)[0] != 0
    assert torch.equal(moves.any(1), moves.all(1)) and moves.any() and not moves.all()
    assert torch.equal(loss.amin(1), loss.amax(1))


def test_one_ratio_is_as_exact_as_eager(device):
    """The value and the gradient with the mean of differences, never rounded beside a log-probability of -30."""
    x = torch.tensor([[-27.682218552, -0.265570164]], device=device).requires_grad_()
    old = torch.tensor([[-27.682621002, -0.265967190]], device=device)
    loss = FL.policy_loss(
        x, old, torch.ones(1, device=device), None, "gspo", "token-sum", clip_low=0.1, clip_high=0.1
    )
    ratio = (x.double() - old.double()).mean().exp().item()
    assert loss.item() == pytest.approx(-2 * ratio, rel=1.2e-7)
    assert grad(loss, x)[0][0].tolist() == pytest.approx([-ratio, -ratio], rel=1.2e-7)
    ref = x.detach() + 1e-6
    kl = FL.policy_loss(
        x, old, torch.zeros(1, device=device), None, "gspo", "token-sum", ref_logps=ref, kl_coef=1.0
    )
    exact = (torch.expm1(ref.double() - x.double()) - (ref.double() - x.double())).sum().item()
    assert kl.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_weight_0_do_not_count(kind, device):
    """Whatever they hold: value, gradients, second derivatives and metrics, of answers and of tokens."""
    results = []
    for held in (-0.5, math.nan, math.inf, -math.inf, 1e38):
        lp, old, a, ref, mask = (x.detach() for x in tokens(torch.float32, device=device))
        h, whole = a.abs(), a[:, 0].clone()
        for x in (lp, old, a, ref, h):
            x[~mask] = held
        whole[1] = held  # an answer without tokens
        inputs = [x.requires_grad_() for x in (lp, h)]
        for m in (mask, mask.float()):
            for advantages in (a, whole):
                if kind == "value":
                    loss, metrics = FL.value_loss(lp, old, a, m, 0.2), {}
                else:
                    generator = torch.Generator("cuda" if device == "cuda" else "cpu").manual_seed(0)
                    loss, metrics = FL.policy_loss(
                        lp, old, advantages, m, kind, ref_logps=ref, kl_coef=0.1, entropies=h, entropy_coef=0.1,
                        return_metrics=True, generator=generator,
                    )  # fmt: skip
                first = grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
                second = grad(first[0].square().sum(), inputs, allow_unused=True, materialize_grads=True)
                results.append((loss, *first, *second, *metrics.values()))
        for x, y in zip(
            [t for r in results[:4] for t in r], [t for r in results[-4:] for t in r], strict=True
        ):
            assert y.isfinite().all() and torch.equal(x, y), held


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("_cov")])
def test_nan_of_a_token_is_not_hidden(kind, device):
    """In each input: the loss is NaN, and its gradient where it depends on that."""
    names = ["logps", "old_logps", "advantages", "ref_logps"]
    names = ["values", "returns", "old_values"] if kind == "value" else names
    for name in names:
        if kind in ("gpg", "reinforce") and name == "old_logps":
            continue  # which they do not look at
        lp, old, a, ref, _ = (x.detach() for x in tokens(torch.float32, device=device))
        given = dict(zip(names, (lp, old, a, ref), strict=False))
        given[name][2, 3] = math.nan
        wanted = given[names[0]].requires_grad_()
        for kl in ("k1", "k3", "abs", "k1+") if kind != "value" else (None,):
            more = (
                {"clip_range": 0.2} if kind == "value" else {"loss_type": kind, "kl_coef": 0.1, "kl_type": kl}
            )
            loss = (FL.value_loss if kind == "value" else FL.policy_loss)(**given, **more)
            assert loss.isnan(), name
            slow = (R.value_loss if kind == "value" else R.policy_loss)(**given, **more)
            mine, theirs = (grad(x, wanted)[0].isnan() for x in (loss, slow))
            assert mine[theirs].all(), (name, kl)
            assert theirs.any() or kl in ("k1", "abs") or name == "ref_logps", (name, kl)
    if kind != "value":  # a factor of 0 takes nothing
        lp, old, a, ref, _ = tokens(torch.float32, device=device)
        assert FL.policy_loss(lp, old, a, None, kind, ref_logps=ref * math.nan).isfinite()
