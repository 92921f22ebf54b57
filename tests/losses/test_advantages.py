"""Advantages of groups, returns of n steps, rewards of exploration, and that every estimator keeps the rule."""

from __future__ import annotations

import pytest
import torch
from support import DTYPES
from torch.autograd import gradcheck

import fastloss.functional as FL
import fastloss.reference as R
from fastloss._cli.check import compare
from fastloss._registry import InputSampler, entries, estimators, losses


@pytest.mark.parametrize(
    ("name", "case"), [(n, c) for n, e in sorted((x.name, x) for x in estimators.values()) for c in e.cases]
)
def test_estimators_are_as_exact_as_their_references(name, case, device):
    entry = estimators[name]
    for dtype in DTYPES:
        for shape in entry.shapes:
            result = compare(entry, case, shape, dtype, device)
            assert result.ok, result


def test_entries_are_losses_and_estimators():
    assert [e.name for e in entries()] == [e.name for e in losses()] + list(estimators)
    with pytest.raises(ValueError, match="no loss named gaee"):
        entries("gaee")


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages(kind):
    rewards = InputSampler(torch.float64).normal(8)
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


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_are_no_signal(kind, device):
    """Exactly 0 in every type, in large groups and in small ones; the ids are any integers."""
    for dtype in DTYPES:
        for n in (2, 3, 7, 64, 1000):
            for value in (0.1, 1.1, -1e4):
                rewards = torch.full((2 * n,), value, dtype=dtype, device=device)
                rewards[n:] = 3
                ids = torch.arange(2 * n, device=device) // n * 10**6 - 5
                for x in (ids, ids.int()):
                    got = FL.group_advantages(rewards, x, kind, epsilon=1e-12)
                    assert got.dtype == dtype and got.count_nonzero() == 0, (dtype, n, value)


def test_advantages_far_from_0(device):
    """Rewards in [1000, 1001]: as exact as the differences that they hold."""
    rewards = 1000 + torch.rand(256, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.arange(256, device=device) % 2
    for kind in ("grpo", "dr_grpo", "rloo"):
        exact = R.group_advantages(rewards.double(), ids, kind)
        torch.testing.assert_close(
            FL.group_advantages(rewards, ids, kind), exact.float(), rtol=1e-7, atol=1e-9
        )
    rewards[0] = torch.nan  # of its own group alone
    assert FL.group_advantages(rewards, ids).isnan().nonzero().flatten().tolist() == list(range(0, 256, 2))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x, i: FL.group_advantages([1.0, 2.0], i), TypeError, "rewards"),
        (lambda x, i: FL.group_advantages(x, [5, 5]), TypeError, "group_ids"),
        (lambda x, i: FL.group_advantages(x, i.float()), TypeError, "group_ids"),
        (lambda x, i: FL.group_advantages(x, i[:1]), ValueError, "group_ids"),
        (lambda x, i: FL.group_advantages(i, i), NotImplementedError, "rewards"),
    ],
)
def test_group_advantages_names_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(2), torch.tensor([5, 5]))


def test_groups_of_any_numbers():
    """The values of the group ids, other groups and threads do not change a bit."""
    draw = InputSampler(torch.float32)
    rewards, ids = draw.normal(1000), draw.index(40, 1000)
    names = torch.randperm(40, generator=torch.Generator().manual_seed(3)) * 10**15 - 10**16
    for kind in ("grpo", "dr_grpo", "rloo"):
        x, y = rewards.clone().requires_grad_(), rewards.clone().requires_grad_()
        got, other = FL.group_advantages(x, ids, kind), FL.group_advantages(y, names[ids], kind)
        assert torch.equal(got, other)
        got.square().sum().backward()
        other.square().sum().backward()
        assert torch.equal(x.grad, y.grad)
        of_seven = ids == 7
        assert torch.equal(FL.group_advantages(rewards[of_seven], ids[of_seven], kind), got[of_seven])
        torch.testing.assert_close(got, R.group_advantages(rewards.double(), ids, kind).float())
    assert FL.group_advantages(rewards[:0], ids[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_in_every_transformation(kind):
    ids = torch.tensor([10**12, -5, 10**12, 7, -5, 10**12, -5, -5])
    r = InputSampler(torch.float64).normal(8).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: FL.group_advantages(r, ids, kind), r)
    assert torch.autograd.gradgradcheck(lambda r: FL.group_advantages(r, ids, kind), r)
    compiled = torch.compile(FL.group_advantages, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(r, ids, kind), FL.group_advantages(r, ids, kind))


def by_hand(rewards, values, end, n, gamma, bootstrap):
    """One row, without truncation: the definition."""
    found = []
    for t in range(len(rewards)):
        total, factor = 0.0, 1.0
        for s in range(t, min(t + n, len(rewards))):
            total, factor = total + factor * rewards[s], factor * gamma
            if end[s]:
                break
        else:
            following = min(t + n, len(rewards))
            total += factor * (values[following] if following < len(values) else bootstrap)
        found.append(total)
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 13, 40])
def test_n_step_returns(n):
    draw = InputSampler(torch.float64)
    rewards, values = draw.normal(2, 13), draw.normal(2, 13)
    end, last = draw.index(6, 2, 13) == 0, draw.normal(2)
    got = FL.n_step_returns(rewards, values, end, n=n, gamma=0.9, bootstrap_value=last)
    for row in range(2):
        wanted = by_hand(
            rewards[row].tolist(), values[row].tolist(), end[row].tolist(), n, 0.9, last[row].item()
        )
        assert got[row].tolist() == pytest.approx(wanted)


def test_n_step_returns_at_truncated_steps_and_its_ends():
    draw = InputSampler(torch.float64)
    rewards, values, after = (draw.normal(3, 9).requires_grad_() for _ in range(3))
    ends = {"terminated": draw.index(5, 3, 9) == 0, "truncated": draw.index(5, 3, 9) == 0}
    for n in (1, 4, 9):
        got = FL.n_step_returns(rewards, values, **ends, next_values=after, n=n)
        torch.testing.assert_close(got, R.n_step_returns(rewards, values, **ends, next_values=after, n=n))
    assert gradcheck(
        lambda r, v, x: FL.n_step_returns(r, v, **ends, next_values=x, n=4), (rewards, values, after)
    )
    assert FL.n_step_returns(torch.zeros(2, 0), torch.zeros(2, 0)).shape == (2, 0)
    # as many steps as there are: the discounted return; one step: TD(0)
    last = draw.normal(3)
    whole = FL.n_step_returns(rewards, values, n=9, bootstrap_value=last)
    torch.testing.assert_close(whole, FL.discounted_returns(rewards, bootstrap_value=last))
    one = FL.n_step_returns(rewards, values, n=1, bootstrap_value=last)
    torch.testing.assert_close(one, FL.td_lambda_returns(rewards, values, lam=0.0, bootstrap_value=last))


@pytest.mark.parametrize("held", [torch.nan, torch.inf, 1e38])
def test_n_step_returns_take_nothing_of_another_episode(held):
    """Rewards and values of the episode behind a terminated step, and next values that nothing bootstraps from."""
    end = torch.tensor([False, False, True, False, False])
    for n in (1, 2, 3, 4, 5):
        found = []
        for value in (0.25, held):
            rewards, values = torch.arange(5.0), torch.arange(5.0) / 4
            rewards[3:] = values[3:] = value
            after = torch.cat([values[1:], torch.zeros(1)])
            inputs = [x.requires_grad_() for x in (rewards, values, after)]
            for given in ({}, {"next_values": after}):
                got = FL.n_step_returns(rewards, values, end, n=n, **given)[:3]
                slow = R.n_step_returns(rewards, values, end, n=n, **given)[:3]
                torch.testing.assert_close(got, slow)
                found += [
                    got,
                    *torch.autograd.grad(got.sum(), inputs, allow_unused=True, materialize_grads=True),
                ]
        half = len(found) // 2
        for x, y in zip(found[:half], found[half:], strict=True):
            assert x.isfinite().all() and torch.equal(x, y)
    # far behind, where the discount is too small for float32, NaN still arrives
    rewards = torch.zeros(3000)
    rewards[-1] = torch.nan
    assert FL.n_step_returns(rewards, torch.zeros(3000), n=3000, gamma=0.9)[0].isnan()
    assert FL.n_step_returns(torch.tensor([1.0, torch.nan]), torch.zeros(2), n=2, gamma=0.0)[0] == 1


def test_n_step_returns_cancel_nothing():
    """A sum of prefix sums would leave the rounding of 1e8 in every later return."""
    rewards = torch.zeros(1, 64)
    rewards[0, 0] = 1e8
    rewards[0, 1:] = 0.1
    got = FL.n_step_returns(rewards, torch.zeros(1, 64), n=3, gamma=1.0)
    torch.testing.assert_close(got[0, 1:-3], torch.full((60,), 0.3))


def test_ride_reward():
    a, b = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[4.0, 5.0], [0.0, 0.0]])
    counts = torch.tensor([4, 1])
    assert FL.ride_reward(a, b, counts).tolist() == [2.5, 0.0]
    assert FL.ride_reward(a, b, counts, "count").tolist() == [1.25, 0.0]
    assert not FL.ride_reward(a.requires_grad_(), b, counts).requires_grad


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: FL.n_step_returns(x, x, n=0), "n:"),
        (lambda x: FL.n_step_returns(x, x, n=1.5), "n:"),
        (lambda x: FL.n_step_returns(x, x[:, 1:]), "values"),
        (lambda x: FL.n_step_returns(x, x, truncated=x > 0), "next_values"),
        (lambda x: FL.n_step_returns(x, x, gamma=1.5), "gamma"),
        (lambda x: FL.ride_reward(x, x[1:], x[:, 0]), "next_embeddings"),
        (lambda x: FL.ride_reward(x, x, x), "counts"),
        (lambda x: FL.ride_reward(x, x, x[:, 0], "sqrt"), "kind"),
    ],
)
def test_refuses(call, match):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
        call(torch.zeros(3, 4))
