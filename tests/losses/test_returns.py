"""Advantages and returns against a plain loop over steps, for every way of ending and packing episodes."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import DTYPES, dtype_id
from torch.autograd import grad, gradcheck, gradgradcheck

import fastloss.functional as FL
import fastloss.reference as R
from fastloss._registry import InputSampler

KINDS = ("plain", "terminated", "truncated", "mask", "mask+bootstrap", "packed", "packed+everything")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = ((1, 1), (2, 3), (19, 33), (3, 130), (2, 2500))
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def episodes(kind, dtype=torch.float64, shape=(3, 7), seed=0, device="cpu"):
    """Rewards, values and the further arguments of one call; masked steps hold NaN."""
    draw = InputSampler(dtype, device, seed)
    rows = shape[0]
    if kind.startswith("packed"):
        lengths = draw.index(shape[1] + 1, rows)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shape = (int(ends[-1]),)
    rewards, values, kwargs = draw.normal(*shape), draw.normal(*shape), {}
    if "packed" in kind:
        kwargs["cu_seqlens"] = ends
    if kind in ("terminated", "truncated", "packed+everything"):
        kwargs["terminated"] = draw.index(5, *shape) == 0
    if kind in ("truncated", "packed+everything"):
        kwargs["truncated"] = draw.index(5, *shape) == 0
        kwargs["next_values"] = draw.normal(*shape)
    if "bootstrap" in kind or kind == "packed":
        kwargs["bootstrap_value"] = draw.normal(rows)
    if "mask" in kind or "everything" in kind:
        kwargs["mask"] = mask = draw.index(3, *shape) > 0
        kwargs["terminated"] = draw.index(7, *shape) == 0
        rewards, values = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.nan)
    return rewards, values, kwargs


def doubled(kwargs):
    return {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}


def assert_near(got, wanted, dtype):
    scale = 1 + wanted.abs().max().item() if wanted.numel() else 1
    torch.testing.assert_close(got.double(), wanted, atol=TOLERANCE[dtype] * scale, rtol=0)


@every_dtype
@every_kind
def test_gae_is_the_loop_forward_and_backward(kind, dtype, device):
    for shape in SHAPES if dtype in (torch.float32, torch.float64) else SHAPES[:3]:
        rewards, values, kwargs = episodes(kind, dtype, shape, device=device)
        inputs = [rewards, values, *(v for v in kwargs.values() if v.is_floating_point())]
        for x in inputs:
            x.requires_grad_()
        got = FL.gae(rewards, values, **kwargs, gamma=0.97, lam=0.9)
        wide = [x.double() for x in (rewards, values)]
        wanted = R.gae(*wide, **doubled(kwargs), gamma=0.97, lam=0.9)
        upstream = [torch.cos(3 * w.detach()).to(dtype) for w in wanted]
        mine = grad(got, inputs, upstream)
        theirs = grad(
            wanted, inputs, [u.double() for u in upstream], allow_unused=True, materialize_grads=True
        )
        for a, b in zip((*got, *mine), (*wanted, *theirs), strict=True):
            assert a.dtype == dtype
            assert_near(a, b.double(), dtype)


def test_gae_of_one_episode_by_hand():
    """A = delta + gamma lambda A of the next step; termination stops both, truncation the trace alone."""
    r, v = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25, 2.0])
    a2 = 3.0 + 0.5 * 8.0 - 2.0
    a1 = 2.0 + 0.5 * 2.0 - 0.25 + 0.5 * 0.5 * a2
    a0 = 1.0 + 0.5 * 0.25 - 0.5 + 0.5 * 0.5 * a1
    last = torch.tensor(8.0)
    got, returns = FL.gae(r, v, bootstrap_value=last, gamma=0.5, lam=0.5)
    assert got.tolist() == [a0, a1, a2]
    assert torch.equal(returns, got + v)
    end = torch.tensor([False, True, False])
    got, _ = FL.gae(r, v, end, bootstrap_value=last, gamma=0.5, lam=0.5)
    assert got[1] == 2.0 - 0.25
    got, _ = FL.gae(r, v, None, end, next_values=torch.tensor([0.25, 7.0, 8.0]), gamma=0.5, lam=0.5)
    assert got[1] == 2.0 + 0.5 * 7.0 - 0.25


def test_packed_is_each_sequence_alone(device):
    rewards, values, kwargs = episodes("packed", torch.float32, (9, 40), device=device)
    ends = kwargs["cu_seqlens"].tolist()
    got = FL.gae(rewards, values, **kwargs)
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        alone = FL.gae(rewards[a:b], values[a:b], bootstrap_value=kwargs["bootstrap_value"][i])
        for x, y in zip(got, alone, strict=True):
            assert torch.equal(x[a:b], y), "a sequence depends on what it is packed with"


def test_a_row_does_not_depend_on_the_others_or_on_threads(device, threads):
    rewards, values, kwargs = episodes("mask+bootstrap", torch.float32, (37, 61), device=device)
    whole = FL.gae(rewards, values, **kwargs)
    for i in (0, 17, 36):
        row = FL.gae(rewards[i], values[i], **{k: v[i] for k, v in kwargs.items()})
        assert all(torch.equal(a[i], b) for a, b in zip(whole, row, strict=True))
    threads(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, FL.gae(rewards, values, **kwargs), strict=True))


@every_kind
def test_gradients_of_gradients(kind, device):
    rewards, values, kwargs = episodes(kind, shape=(2, 4), device=device)
    rewards, values = rewards.nan_to_num(), values.nan_to_num()
    numbers = {k: v.requires_grad_() for k, v in kwargs.items() if v.is_floating_point()}
    flags = {k: v for k, v in kwargs.items() if k not in numbers}

    def function(r, v, *more):
        return FL.gae(r, v, **flags, **dict(zip(numbers, more, strict=True)))

    inputs = (rewards.requires_grad_(), values.requires_grad_(), *numbers.values())
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@every_kind
def test_discounted_and_lambda_returns(kind, device):
    rewards, values, kwargs = episodes(kind, torch.float64, (5, 33), device=device)
    torch.testing.assert_close(
        FL.td_lambda_returns(rewards, values, **kwargs, gamma=0.9, lam=0.8),
        R.gae(rewards, values, **kwargs, gamma=0.9, lam=0.8)[1],
    )
    kwargs = {k: v for k, v in kwargs.items() if k not in ("truncated", "next_values")}
    got = FL.discounted_returns(rewards, **kwargs, gamma=0.9)
    torch.testing.assert_close(got, R.discounted_returns(rewards, **kwargs, gamma=0.9))
    # with lambda 1 the values cancel
    torch.testing.assert_close(got, FL.td_lambda_returns(rewards, values, **kwargs, gamma=0.9, lam=1.0))


@every_dtype
@every_kind
def test_vtrace_is_the_loop(kind, dtype, device):
    for shape in SHAPES[:4]:
        rewards, values, kwargs = episodes(kind, dtype, shape, device=device)
        log_rhos = InputSampler(dtype, device, 5).normal(*rewards.shape).requires_grad_()
        options = {"gamma": 0.9, "lam": 0.95, "clip_rho_threshold": 1.5, "clip_pg_rho_threshold": 1.2}
        got = FL.vtrace(log_rhos, rewards, values, **kwargs, **options)
        wide = [x.double() for x in (log_rhos, rewards, values)]
        for a, b in zip(got, R.vtrace(*wide, **doubled(kwargs), **options), strict=True):
            assert a.dtype == dtype and not a.requires_grad
            assert_near(a, b, dtype)


def test_vtrace_on_policy_is_the_lambda_return(device):
    """With ratios of 1 and no thresholds below, v is the TD(lambda) return."""
    rewards, values, kwargs = episodes("mask+bootstrap", shape=(4, 20), device=device)
    v, _ = FL.vtrace(torch.zeros_like(rewards), rewards, values, **kwargs, gamma=0.9, lam=0.7)
    torch.testing.assert_close(v, FL.td_lambda_returns(rewards, values, **kwargs, gamma=0.9, lam=0.7))


def test_compiles_and_maps(real_device):
    rewards, values, kwargs = episodes("mask+bootstrap", torch.float32, (4, 20), device=real_device)
    rewards, values = rewards.nan_to_num().requires_grad_(), values.nan_to_num().requires_grad_()
    expected = FL.gae(rewards, values, **kwargs)
    step = torch.compile(lambda r, v: FL.gae(r, v, **kwargs), fullgraph=True, backend="aot_eager")
    got = step(rewards, values)
    mapped = torch.func.vmap(lambda r, v, m, b: FL.gae(r, v, mask=m, bootstrap_value=b))(
        rewards, values, kwargs["mask"], kwargs["bootstrap_value"]
    )
    without = FL.gae(rewards, values, mask=kwargs["mask"], bootstrap_value=kwargs["bootstrap_value"])
    for a, b, c, d in zip(got, expected, mapped, without, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, d)
    for a, b in zip(
        grad(got[0].sum(), (rewards, values)), grad(expected[0].sum(), (rewards, values)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_layouts_empty_sizes_and_mixed_types(device):
    rewards, values, kwargs = episodes("terminated", torch.float32, (5, 9), device=device)
    expected = FL.gae(rewards, values, **kwargs)
    strided = [x.mT.contiguous().mT for x in (rewards, values)]
    for a, b in zip(FL.gae(*strided, **kwargs), expected, strict=True):
        assert torch.equal(a, b)
    cube = FL.gae(rewards.reshape(5, 3, 3), values.reshape(5, 3, 3))[0]
    assert torch.equal(cube[2], FL.gae(rewards.reshape(5, 3, 3)[2], values.reshape(5, 3, 3)[2])[0])
    for shape in ((0, 4), (3, 0), (0,)):
        empty = torch.empty(shape, device=rewards.device)
        assert FL.gae(empty, empty)[0].shape == shape
    assert FL.gae(rewards.bfloat16(), values)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"values": torch.zeros(3, 6)}, "values: expected the shape"),
        ({"values": torch.zeros(3, 7).long()}, "values: expected a floating"),
        ({"terminated": torch.zeros(7, dtype=torch.bool)}, "terminated"),
        ({"truncated": torch.zeros(3, 7, dtype=torch.bool)}, "needs next_values"),
        ({"bootstrap_value": torch.zeros(4)}, "bootstrap_value"),
        (
            {"bootstrap_value": torch.zeros(3), "next_values": torch.zeros(3, 7)},
            "cannot be combined with next_values",
        ),
        ({"cu_seqlens": torch.tensor([0, 7])}, "one dimension"),
        ({"gamma": 1.5}, "gamma"),
        ({"lam": -0.1}, "lam"),
    ],
)
def test_errors_name_the_argument(change, match):
    with pytest.raises((ValueError, TypeError), match=match):
        FL.gae(**{"rewards": torch.zeros(3, 7), "values": torch.zeros(3, 7)} | change)


@pytest.mark.parametrize("ends", [[0, 4], [1, 7], [0, 8], [0, 5, 3, 7]])
def test_offsets_are_checked(ends):
    """A ValueError that begins with the argument, of every function that takes offsets."""
    x, ends = torch.zeros(7), torch.tensor(ends)
    for function, arguments in (
        (FL.gae, (x, x)), (FL.td_lambda_returns, (x, x)), (FL.discounted_returns, (x,)), (FL.vtrace, (x, x, x)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^cu_seqlens: expected"):
            function(*arguments, cu_seqlens=ends)


@pytest.mark.parametrize("name", ["terminated", "mask", "bootstrap_value", "cu_seqlens"])
def test_lists_are_named(name):
    with pytest.raises(TypeError, match=name):
        FL.gae(torch.zeros(7), torch.zeros(7), **{name: [0] * 7})


def terminated_episodes(kind, held, dtype, steps, device):
    """Rows that end at every place, and what stands behind the end; `kept` are the steps up to it."""
    place = torch.arange(steps, device=device)
    last = place.unsqueeze(1)
    end, kept = place == last, place <= last
    draw = InputSampler(dtype, device, 1)
    inputs = {"rewards": draw.normal(steps, steps), "values": draw.normal(steps, steps)}
    inputs = {k: v.masked_fill(~kept, held) for k, v in inputs.items()}
    kwargs = {"terminated": end}
    if kind == "next_values":
        inputs["next_values"] = draw.normal(steps, steps).masked_fill(place >= last, held)
        kwargs["truncated"] = draw.index(4, steps, steps) == 0
    if kind == "bootstrap_value":
        inputs["bootstrap_value"] = torch.full((steps,), held, dtype=dtype, device=device)
    if kind == "mask":
        kwargs["mask"] = mask = draw.index(4, steps, steps) > 0
        inputs = {k: v.masked_fill(~mask, held) for k, v in inputs.items()}
        kept, kwargs["mask"] = kept & (mask | end), mask | end
        for x in inputs.values():
            x[end] = 0.5
    return {k: v.requires_grad_() for k, v in inputs.items()}, kwargs, kept


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("kind", ["plain", "next_values", "bootstrap_value", "mask"])
def test_behind_a_terminated_step_nothing_follows(kind, steps, device):
    """NaN, infinities and 1e38 there change no bit of results, gradients and second derivatives before it."""
    for dtype in (torch.float32, torch.float64):
        results = []
        for held in (0.25, torch.nan, torch.inf, 1e38):
            inputs, kwargs, kept = terminated_episodes(kind, held, dtype, steps, device)
            got = FL.gae(**inputs, **kwargs)
            up = [InputSampler(dtype, device, s).normal(steps, steps).requires_grad_() for s in (2, 3)]
            first = grad(
                got, list(inputs.values()), [torch.where(kept, u, 0.0) for u in up], create_graph=True
            )
            second = grad(sum(g.square().sum() for g in first), up)
            v, pg = FL.vtrace(inputs["rewards"].detach().nan_to_num().clamp(-1, 1), **inputs, **kwargs)
            slow = R.gae(**inputs, **kwargs)
            for a, b in zip(got, slow, strict=True):
                torch.testing.assert_close(a[kept], b[kept])
            for a, b in zip(
                grad(slow, list(inputs.values()), [torch.where(kept, u, 0.0) for u in up]), first
            ):
                torch.testing.assert_close(a, b)
            each = [x[kept] for x in (*got, v, pg)]
            if kind in ("plain", "mask"):
                rewards, end = inputs["rewards"], kwargs["terminated"]
                each.append(FL.discounted_returns(rewards, end, mask=kwargs.get("mask"))[kept])
            results.append([*each, *first, *second])
            for a, b in zip(results[0], results[-1], strict=True):
                assert b.isfinite().all(), held
                assert torch.equal(a, b), held


def test_gradients_from_another_episode_do_not_arrive(device):
    """An upstream gradient of NaN at one episode reaches nothing of the next."""
    inputs = [InputSampler(torch.float32, device, s).normal(6).requires_grad_() for s in range(3)]
    end = torch.tensor([False, False, True, False, False, False], device=device)
    got, _ = FL.gae(*inputs[:2], end, next_values=inputs[2])
    up = torch.tensor([torch.nan] * 3 + [1.0] * 3, device=device)
    for g in grad(got, inputs, up):
        assert g[3:].isfinite().all()
    assert grad(FL.gae(*inputs[:2], end, next_values=inputs[2])[0], inputs[2], up)[0][2] == 0


def test_nan_of_an_episode_stays(device):
    """However far behind, past where a product of discounts underflows; an importance ratio of NaN is none of 1."""
    for steps in (3, 40, 3000):
        rewards = torch.zeros(steps, device=device)
        rewards[-1] = torch.nan
        values = torch.zeros_like(rewards)
        assert FL.gae(rewards, values, gamma=0.9, lam=0.5)[0].isnan().all()
        v, pg = FL.vtrace(torch.zeros_like(rewards), rewards, values, gamma=0.5)
        assert v.isnan().all() and pg.isnan().all()
    rhos = torch.tensor([0.0, torch.nan, 0.0], device=device)
    for x, y in zip(
        FL.vtrace(rhos, torch.ones_like(rhos), torch.ones_like(rhos)),
        R.vtrace(rhos, torch.ones_like(rhos), torch.ones_like(rhos)),
        strict=True,
    ):
        torch.testing.assert_close(x, y, equal_nan=True)
        assert x[1].isnan() and not x[2].isnan()
