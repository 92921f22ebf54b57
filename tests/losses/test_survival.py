"""Survival losses: ties, censoring, hazards of any range, cohorts longer than a tile."""

from __future__ import annotations

import math

import pytest
import torch
from support import same_bits
from torch.autograd import grad

import fastloss.functional as F
from fastloss import reference

every_ties = pytest.mark.parametrize("ties", ["breslow", "efron"])


def cohort(n, device="cpu", times=None, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    score = torch.randn(n, generator=g, dtype=dtype).to(device).requires_grad_()
    durations = torch.randint(1, (times or n) + 1, (n,), generator=g).to(device, dtype)
    return score, durations, (torch.rand(n, generator=g) > 0.4).to(device, dtype)


def by_hand(h, durations, events, ties):
    """The partial likelihood time by time, from the text of the definitions."""
    total = 0.0
    for t in sorted(set(durations.tolist())):
        risk = [math.exp(x) for x, d in zip(h.tolist(), durations.tolist(), strict=True) if d >= t]
        tied = [
            x for x, d, e in zip(h.tolist(), durations.tolist(), events.tolist(), strict=True) if d == t and e
        ]
        for place, x in enumerate(tied):
            fraction = place / len(tied) if ties == "efron" else 0.0
            total -= x - math.log(sum(risk) - fraction * sum(map(math.exp, tied)))
    return total / max(int(events.sum()), 1)


@every_ties
@pytest.mark.parametrize(("n", "times"), [(1, 1), (7, 1), (40, 5), (40, 1000)])
def test_cox_by_hand(n, times, ties, device):
    h, durations, events = cohort(n, device, times)
    assert F.cox_ph_loss(h, durations, events, ties=ties).item() == pytest.approx(
        by_hand(h, durations, events, ties), rel=1e-12
    )


@pytest.mark.parametrize(("n", "times"), [(1, 1), (40, 3), (40, 1000)])
def test_dart_by_hand(n, times, device):
    theta, durations, events = cohort(n, device, times)
    e = (durations.log() - theta).tolist()
    pairs = sum(max(0.0, b - a) for a, d in zip(e, events.tolist(), strict=True) if d for b in e) / n**2
    squares = 0.3 * sum(x * x for x in e) / n + 0.2 * theta.square().mean().item()
    assert F.dart_loss(theta, durations, events).item() == pytest.approx(pairs, rel=1e-12)
    weighted = F.dart_loss(theta, durations, events, alpha=0.3, beta=0.2)
    assert weighted.item() == pytest.approx(pairs + squares, rel=1e-12)


def calls(score, durations, events):
    strata = torch.arange(score.numel(), device=score.device) % 3
    for ties in ("breslow", "efron"):
        yield F.cox_ph_loss, reference.cox_ph_loss, {"ties": ties}
        yield F.cox_ph_loss, reference.cox_ph_loss, {"ties": ties, "strata": strata, "reduction": "none"}
    yield F.dart_loss, reference.dart_loss, {"alpha": 0.1, "beta": 0.1, "reduction": "none"}


@pytest.mark.parametrize("times", [1, 30, 10**6])
@pytest.mark.slow
def test_longer_than_a_tile(times, device):
    """On a GPU a cohort of this size takes three blocks, and ties reach across them."""
    score, durations, events = cohort(4500, device, times)
    for function, slow, options in calls(score, durations, events):
        got, true = (f(score, durations, events, **options) for f in (function, slow))
        upstream = torch.linspace(0.5, 1.5, got.numel(), dtype=got.dtype, device=device).view(got.shape)
        torch.testing.assert_close(got, true, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(
            grad(got, score, upstream)[0], grad(true, score, upstream)[0], rtol=1e-9, atol=1e-11
        )


@every_ties
@pytest.mark.parametrize("falls", [False, True])
def test_hazards_of_any_range(ties, falls, device):
    """The largest hazard does not overflow, the smallest is not lost among the others."""
    h = torch.linspace(-1e4, 1e4, 500, device=device, requires_grad=True)
    durations = torch.arange(500.0, device=device) // 2
    durations = -durations if falls else durations
    events = torch.ones_like(durations)
    loss = F.cox_ph_loss(h, durations, events, ties=ties, reduction="none")
    wide = h.detach().double().requires_grad_()
    true = reference.cox_ph_loss(wide, durations, events, ties=ties, reduction="none")
    torch.testing.assert_close(loss.double(), true, rtol=1e-6, atol=1e-9)
    g = grad(loss.sum(), h)[0]
    assert g.isfinite().all()
    torch.testing.assert_close(g.double(), grad(true.sum(), wide)[0], rtol=1e-6, atol=1e-6)


def test_hazards_that_creep_upwards(device):
    """A sum that is rescaled at every step would be off by the steps' roundings."""
    n = 20000
    h = (1 + torch.arange(n, device=device) * 2.0**-23).flip(0)
    durations = torch.arange(n, device=device)
    last = F.cox_ph_loss(h, durations, torch.ones(n, device=device), reduction="none")[0]
    exact = h.double().logsumexp(0) - h[0].double()
    assert last.item() == pytest.approx(exact.item(), rel=2e-7)


def test_nobody_had_the_event(device):
    for n in (0, 1, 9):
        h = torch.full((n,), 3.0, device=device, requires_grad=True)
        durations = torch.ones(n, device=device)
        for function in (F.cox_ph_loss, F.dart_loss):
            loss = function(h, durations, torch.zeros(n, device=device))
            assert loss.item() == 0
            assert torch.equal(grad(loss, h)[0], torch.zeros_like(h))


def test_censored_before_all_events_do_not_matter(device):
    h, durations, events = cohort(20, device)
    durations, events = durations + 5, torch.ones_like(events)
    more = torch.cat([h, h.new_tensor([4.0, -2.0])])
    later, seen = torch.cat([durations, durations.new_tensor([1, 2])]), torch.cat([events, events[:2] * 0])
    expected = F.cox_ph_loss(h, durations, events)
    torch.testing.assert_close(F.cox_ph_loss(more, later, seen), expected, rtol=1e-12, atol=0)


@every_ties
def test_strata_are_cohorts(ties, device):
    parts = [cohort(n, device, 6, seed=n) for n in (5, 1, 12)]
    together = [torch.cat([part[k] for part in parts]) for k in range(3)]
    strata = torch.tensor([7] * 5 + [-1] * 1 + [3] * 12, device=device)
    mixed = torch.randperm(18, generator=torch.Generator().manual_seed(1)).to(device).sort()[1]
    got = F.cox_ph_loss(*together, strata=strata, ties=ties, reduction="sum")
    expected = sum(F.cox_ph_loss(*part, ties=ties, reduction="sum") for part in parts)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    again = F.cox_ph_loss(*(t[mixed] for t in together), strata=strata[mixed], ties=ties, reduction="sum")
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=0)


def test_cohorts_in_rows(device):
    rows = [cohort(33, device, 9, torch.float32, seed) for seed in range(4)]
    stacked = [torch.stack([row[k] for row in rows]) for k in range(3)]
    for function in (F.cox_ph_loss, F.dart_loss):
        whole = function(*stacked, reduction="none")
        for row, one in zip(rows, whole, strict=True):
            assert same_bits(function(*row, reduction="none"), one)


def test_output_of_a_network(device):
    h, durations, events = cohort(12, device)
    for function in (F.cox_ph_loss, F.dart_loss):
        expected = function(h, durations, events)
        assert same_bits(function(h.unsqueeze(-1), durations, events), expected)
        assert same_bits(function(h, durations.long(), events.bool()), expected)


def test_columns_are_one_cohort(device):
    """(N, 1) of all, as of a table, is not N cohorts of one, of which each loss is 0."""
    h, durations, events = cohort(12, device, 5)
    strata = torch.arange(12, device=device) % 2
    for function, more in (
        (F.cox_ph_loss, {"strata": strata}),
        (F.cox_ph_loss, {}),
        (F.dart_loss, {"alpha": 0.1}),
    ):
        columns = {k: v.unsqueeze(-1) if isinstance(v, torch.Tensor) else v for k, v in more.items()}
        for reduction in ("none", "mean", "sum"):
            expected = function(h, durations, events, reduction=reduction, **more)
            given = [x.unsqueeze(-1) for x in (h, durations, events)]
            got = function(*given, reduction=reduction, **columns)
            assert expected.abs().sum() > 0
            assert same_bits(got, expected)
            assert same_bits(grad(got.sum(), h)[0], grad(expected.sum(), h)[0])
            slow = getattr(reference, function.__name__)(*given, reduction=reduction, **columns)
            torch.testing.assert_close(slow, expected)
    for bad in ((h, durations[:, None], events), (h[:, None], durations[:, None], events)):
        with pytest.raises(RuntimeError, match="durations"):
            F.cox_ph_loss(*bad)


@pytest.mark.parametrize("held", [math.nan, math.inf, -math.inf, 1e38])
@every_ties
def test_who_is_never_at_risk_does_not_matter(held, ties, device):
    """Censored before the first event: value, gradient and second derivative are those of any number."""
    results = []
    for value in (0.0, held):
        h, durations, events = cohort(20, device, 7, torch.float32)
        durations, events = durations + 5, events.clone()
        durations[[3, 11]], events[[3, 11]] = 1, 0
        h = h.detach()
        h[[3, 11]] = value
        h.requires_grad_()
        loss = F.cox_ph_loss(h, durations, events, ties=ties)
        (first,) = grad(loss, h, create_graph=True)
        results.append((loss, first, grad(first.square().sum(), h)[0]))
    for x, y in zip(*results, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"durations": torch.ones(4)}, "durations"),
        ({"events": torch.ones(3, 3)}, "events"),
        ({"log_h": torch.ones(3).long()}, "log_h"),
        ({"log_h": torch.ones(())}, "log_h"),
        ({"ties": "exact"}, "ties"),
        ({"strata": torch.ones(3)}, "strata"),
        ({"reduction": "batchmean"}, "reduction"),
    ],
)
def test_refuses(change, match):
    arguments = {"log_h": torch.ones(3), "durations": torch.ones(3), "events": torch.ones(3)}
    with pytest.raises((ValueError, RuntimeError, TypeError), match=match):
        F.cox_ph_loss(**arguments | change)
    with pytest.raises(ValueError, match="alpha"):
        F.dart_loss(torch.ones(3), torch.ones(3), torch.ones(3), alpha=-1.0)
