"""Random shapes, strides, options and types against the float64 reference."""

from __future__ import annotations

import itertools

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import (
    DTYPES,
    assert_right,
    differentiable,
    exact,
    has_reductions,
    is_float,
    make,
    requiring,
    tensors,
)
from support.layouts import LAYOUTS, expanded, lay_each

from fastloss._registry import losses

PAIRS = [(loss, case) for loss in losses() for case in loss.cases]


@st.composite
def calls(draw):
    loss, case = draw(st.sampled_from(PAIRS))
    rank = len(draw(st.sampled_from(loss.shapes)))
    # Sizes around the widths of vectors and of the blocks that kernels unroll to.
    size = st.one_of(st.integers(1, 9), st.integers(10, 70), st.sampled_from([127, 128, 129, 257, 511, 513]))
    shape = tuple(draw(st.integers(1, 9)) if i != 1 and rank > 1 else draw(size) for i in range(rank))
    dtype = draw(st.sampled_from(DTYPES))
    more = {"reduction": draw(st.sampled_from(["none", "mean", "sum"]))} if has_reductions(loss) else {}
    layouts = draw(st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 100.0]))
    return loss, case, shape, dtype, draw(st.integers(0, 2**31)), more, layouts, scale


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(calls())
def test_any_call(device, call):
    loss, case, shape, dtype, seed, more, layouts, scale = call
    # in one dimension every cosine is 1 or -1, where an angle has no derivative; at the origin no cosine has one
    assume(loss.family != "angular_margin" or shape[1] > 1)
    of_features = ("angular_margin", "contrastive", "supervised_contrastive", "retrieval", "metric_learning")
    assume(loss.family not in of_features or scale > 0)
    # which tokens have the largest covariance is open where several have the same
    assume(case != "kl_cov" or (scale > 0 and expanded not in layouts))
    kwargs = make(loss, case, dtype, device, shape, seed, **more)
    first = kwargs[loss.wrt[0]]
    if is_float(first):
        kwargs[loss.wrt[0]] = first.detach() * torch.tensor(scale, dtype=dtype)
    kwargs |= lay_each(tensors(kwargs), itertools.cycle(layouts))
    kwargs = requiring(kwargs, differentiable(loss, kwargs))
    # at the edge of a domain (a log-probability of 0) the reference's own gradient may be 0 times infinity
    true = exact(loss, kwargs, differentiable(loss, kwargs))
    assume(not any(grad.isnan().any() for grad in true.grads.values()))
    assert_right(loss, kwargs)
