"""Small calls with known answers: what users of other libraries tripped over, one of each kind.

The contract tests ask the same of every loss; these are the plain calls, with the numbers that are right.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as T
from torch.utils.flop_counter import FlopCounterMode

import fastloss.functional as F
from fastloss import memory, recipes, reference
from fastloss import nn as N

NAN = float("nan")
tensor = torch.tensor


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)
    torch._dynamo.reset()


def close(got, wanted, **tolerance):
    wanted = wanted if isinstance(wanted, torch.Tensor) else tensor(wanted, dtype=got.dtype)
    torch.testing.assert_close(got.detach(), wanted.detach().to(got.dtype), **tolerance)


# ---- derivatives ----------------------------------------------------------------------------------------


def test_forward_mode():
    x, y, v = torch.randn(4, 5), tensor([0, 1, 2, 3]), torch.randn(4, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        found, wanted = (
            forward_ad.unpack_dual(f(dual, y)).tangent for f in (F.cross_entropy, T.cross_entropy)
        )
    close(found, wanted)

    def ours(x):
        return F.cross_entropy(x, y)

    jacobian = torch.autograd.functional.jacobian(ours, x, vectorize=True, strategy="forward-mode")
    close(jacobian, torch.autograd.functional.jacobian(lambda x: T.cross_entropy(x, y), x))
    close(torch.func.linearize(ours, x)[1](v), wanted)


def test_compiled_gradient():
    x, y = torch.randn(4, 5), tensor([0, 1, 2, 3])
    weight, hidden = torch.randn(7, 5), torch.randn(4, 5)

    def grad(x):
        return torch.func.grad(lambda x: F.cross_entropy(x, y))(x)

    def beside(x):
        return torch.func.grad(lambda x: F.cross_entropy(x, y) + x.square().sum())(x) - 2 * x

    def head(w):
        return torch.func.grad(lambda w: F.linear_cross_entropy(hidden, w, y))(w)

    assert grad(x).abs().max() > 0.1
    close(torch.compile(grad, backend="aot_eager")(x), grad(x))
    close(torch.compile(beside, backend="aot_eager")(x), grad(x))
    close(torch.compile(head, backend="aot_eager")(weight), head(weight))
    close(head(weight), torch.func.grad(lambda w: T.cross_entropy(hidden @ w.T, y))(weight))


def test_compiled_with_transposed_input():
    net, x = torch.nn.Linear(4, 5), torch.randn(2, 6, 4)
    t, n, m = tensor([[1, 2], [3, 4]]), tensor([6, 6]), tensor([2, 2])
    torch.compile(lambda x: F.ctc_loss(net(x).log_softmax(-1).transpose(0, 1), t, n, m))(x).backward()
    found, net.weight.grad = net.weight.grad, None
    T.ctc_loss(net(x).log_softmax(-1).transpose(0, 1), t, n, m).backward()
    close(found, net.weight.grad)


def test_in_place_beside_another_gradient():
    x = torch.randn(6, 7)

    def gradient(inplace):
        q = x.softmax(-1).requires_grad_()
        F.cross_entropy(x.clone().requires_grad_() * 1, q, inplace_backward=inplace).backward()
        return q.grad

    close(gradient(True), gradient(False))


def test_in_place_on_shared_memory():
    b = torch.zeros(1, 7).requires_grad_()
    with pytest.raises(RuntimeError, match="share no memory"):
        F.cross_entropy((b * 1).expand(6, 7), torch.arange(6), inplace_backward=True)


# ---- modules --------------------------------------------------------------------------------------------


def test_modules_of_binary_cross_entropy():
    p, weight = torch.rand(6, 7), tensor([5.0])
    close(N.BCELoss(weight)(p, p.round()), torch.nn.BCELoss(weight)(p, p.round()))
    assert N.BCELoss(weight, reduction="none")(p, p.round()).shape == (6, 7)
    positive = N.BCEWithLogitsLoss(pos_weight=torch.ones(7))
    assert dict(positive.named_buffers()).keys() == {"pos_weight"}


def test_modules_take_no_more_than_they_use():
    x, y = torch.randn(6, 7), torch.arange(6)
    with pytest.raises(TypeError):
        N.CrossEntropyLoss()(x, y, torch.rand(6), "anything", None)
    with pytest.raises(TypeError):
        N.SimPOLoss()(tensor([-1.0]), tensor([-2.0]), 10.0)
    with pytest.raises(TypeError):
        N.TripletMarginLoss()(x, x, x, 0.2, 1.0, 1e-6, True)


def test_no_private_names():
    assert not [name for name in N.__all__ if name.startswith("_")]
    assert copy.deepcopy(N.MSELoss())(torch.ones(2), torch.zeros(2)) == 1


# ---- arguments ------------------------------------------------------------------------------------------


def test_background_among_the_columns_is_negative():
    x = torch.zeros(1, 2)
    close(
        F.sigmoid_focal_loss(x, tensor([0]), background_index=0), F.sigmoid_focal_loss(x, torch.zeros(1, 2))
    )
    close(
        reference.sigmoid_focal_loss(x, tensor([0]), background_index=0),
        F.sigmoid_focal_loss(x, torch.zeros(1, 2)),
    )


def test_weight_of_a_single_row():
    x, y = torch.randn(5), tensor(2)
    close(F.cross_entropy(x, y, sample_weight=tensor(0.5), reduction="sum"), 0.5 * T.cross_entropy(x, y))


def test_numbers_of_numpy_and_torch():
    x, y = torch.randn(6, 7), torch.arange(6)
    close(F.cross_entropy(x, y, ignore_index=np.int64(0)), T.cross_entropy(x, y, ignore_index=0))
    close(F.cross_entropy(x, y, label_smoothing=np.float32(0.5)), T.cross_entropy(x, y, label_smoothing=0.5))
    close(F.huber_loss(x, x + 2, delta=tensor(1.0)), T.huber_loss(x, x + 2, delta=1.0))
    logp = x.log_softmax(-1)
    close(
        F.ctc_loss(logp[:, None], tensor([[1]]), [6], [1], np.int64(0)),
        T.ctc_loss(logp[:, None], tensor([[1]]), [6], [1], 0),
    )


def test_warning_of_broadcasting():
    for function in (F.mse_loss, T.mse_loss):
        with pytest.warns(UserWarning, match="target size"):
            function(torch.randn(4, 1), torch.randn(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.mse_loss(torch.randn(4, 1), torch.randn(4, 1))


def test_messages_without_source_positions():
    with pytest.raises(IndexError) as error:
        F.cross_entropy(torch.randn(2, 3), tensor([0, 3]))
    assert str(error.value).startswith("Target 3 is out of bounds")
    with pytest.raises(ValueError, match=r"^cu_seqlens"):
        F.gae(torch.ones(3), torch.zeros(3), cu_seqlens=tensor([0, 2]))
    with pytest.raises(TypeError, match="rewards"):
        F.group_advantages([1.0, 2.0], tensor([5, 5]))


def test_torchs_shapes_of_triplets():
    a, p, n = torch.ones(1, 4), torch.zeros(3, 4), torch.ones(3, 4)
    close(F.triplet_margin_loss(a, p, n), T.triplet_margin_loss(a, p, n))
    close(F.triplet_margin_loss(a, p.double(), n), T.triplet_margin_loss(a, p.double(), n))
    x = torch.randn(2, 3, 4)
    close(F.triplet_margin_loss(x, x + 1, x - 1), T.triplet_margin_loss(x, x + 1, x - 1))
    with pytest.raises(RuntimeError):
        F.binary_cross_entropy(tensor([1.5]), tensor([1.0]))


def test_columns_are_one_cohort():
    risk = tensor([0.3, -1.0, 2.0])
    for shape in ((3,), (3, 1)):
        value = F.cox_ph_loss(
            risk.view(shape), tensor([1.0, 2.0, 3.0]).view(shape), torch.ones(3).view(shape)
        )
        close(value, 1.6525, rtol=1e-4, atol=0)


def test_capability_that_does_not_exist():
    child = subprocess.run(
        [sys.executable, "-c", "import fastloss._C as c; print(c.cpu_capability())"],
        env=os.environ | {"FASTLOSS_CPU_CAPABILITY": "avx1024"}, capture_output=True, text=True,
    )  # fmt: skip
    assert "avx1024" in child.stderr
    assert child.stdout.strip() != "sse2"


# ---- floating point -------------------------------------------------------------------------------------


def test_gradient_of_a_mean_near_the_largest_number():
    e = tensor([2e38, 1.0]).requires_grad_()
    F.mse_loss(e, torch.zeros(2)).backward()
    close(e.grad, [2e38, 1.0])


def test_infinite_upstream_gradient():
    """Infinite where the probability of a class is off; torch's own at the target is inf - inf."""
    x, y = torch.randn(3, 4).half().requires_grad_(), torch.arange(3)
    (F.cross_entropy(x, y) * 65536).backward()
    wanted = torch.full((3, 4), torch.inf).half()
    wanted[torch.arange(3), y] = -torch.inf
    close(x.grad, wanted)


def test_softplus_far_from_zero():
    x = tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    y = tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    loss = F.info_nce(x, y, temperature=1 / 21, reduction="none")[1].item() - 21
    assert loss == pytest.approx(7.58e-10, rel=1e-3)


def test_tilted_losses_of_any_size():
    close(F.tilted_loss(tensor([9.0, 10.0, 11.0]), -10.0), 9.109857)
    x = torch.rand(17) + 9
    close(F.tilted_loss(x, -10.0), ((-10 * x.double()).logsumexp(0) - math.log(17)) / -10)
    assert F.tilted_loss(tensor([-100.0, -101.0, -102.0]), 1.0) < -100
    assert F.tilted_loss(torch.rand(16) + 9, -10.0, mask=torch.arange(16) > 0) > 9
    weight = tensor([0.0, 1.0])
    close(reference.tilted_loss(tensor([-134.0, 68.0]), -50.0, sample_weight=weight), 68.0)


def test_nan_stays_nan():
    nan, one = tensor([NAN]), tensor([-1.0])
    assert F.dpo_loss(nan, one, one, one, loss_type="hinge").isnan()
    assert F.simpo_loss(nan, one, loss_type="hinge").isnan()
    assert F.cpo_loss(nan, one, loss_type="hinge").isnan()


def test_nothing_follows_a_terminated_step():
    rewards, values, end = torch.ones(3), torch.zeros(3), tensor([False, True, False])
    after = tensor([0.0, NAN, 0.0])
    close(F.gae(rewards, values, end, next_values=after)[0], [1.9405, 1.0, 1.0])
    close(F.n_step_returns(rewards, values, end, n=3, next_values=after), [1.99, 1.0, 1.0])
    returns = F.discounted_returns(tensor([1.0, 1.0, NAN]), end)
    close(returns[:2], [1.99, 1.0])
    assert returns[2].isnan()


def test_pairs_of_no_weight_or_length():
    p = tensor([-3.0, 0.0], requires_grad=True)
    loss = F.dpo_loss(
        p, tensor([-4.0, -2.0]), tensor([-3.0, 0.0]), tensor([-4.0, -2.0]), loss_type="ipo",
        chosen_lengths=tensor([2, 0]), rejected_lengths=tensor([2, 1]), weight=tensor([1.0, 0.0]),
    )  # fmt: skip
    close(torch.autograd.grad(loss, p)[0].isnan(), tensor([False, False]))


def test_ignored_logits_of_cringe():
    logits = torch.randn(2, 5)
    logits[1] = NAN
    assert recipes.cringe_loss(logits, tensor([1, -100])).isfinite()


def test_group_of_equal_rewards():
    advantages = F.group_advantages(torch.full((64,), 1.1), torch.zeros(64, dtype=torch.long))
    assert not advantages.any()
    close(F.group_advantages(tensor([1.0, 2.0]), tensor([5, 5])), [-0.70706, 0.70706], rtol=1e-3, atol=0)


def test_tokens_of_an_answer_have_one_ratio():
    x = tensor([[-27.682218552, -0.265570164]], requires_grad=True)
    old = tensor([[-27.682621002, -0.265967190]])
    bounds = {"clip_low": 3e-4, "clip_high": 4e-4}
    loss = F.policy_loss(x, old, torch.ones(1), None, "gspo", "token-sum", **bounds)
    clipped = torch.autograd.grad(loss, x)[0] == 0
    assert clipped.all() or not clipped.any()


def test_hardest_rows_beside_an_offset():
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)) + 1000
    y = torch.arange(24) // 3
    d, same = (
        torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist"),
        y[:, None] == y,
    )
    wanted = (torch.where(same, d, -1.0).amax(1) - torch.where(same, 1e9, d).amin(1) + 1).clamp(min=0).mean()
    close(F.batch_hard_triplet_loss(x, y, 1.0), wanted)


# ---- conventions ----------------------------------------------------------------------------------------


def test_answers_without_tokens():
    logps, mask = torch.zeros(2, 2), tensor([[1.0, 1.0], [0.0, 0.0]])
    modes = {"seq-mean-token-mean": 1.0, "seq-mean-token-sum": 2.0, "seq-mean-token-sum-norm": 1.0}
    for mode, wanted in modes.items():
        close(F.policy_loss(logps, logps, tensor([-1.0, -1.0]), mask, "ppo", mode), wanted)


def test_sft_is_the_mean_of_all_tokens():
    z = torch.zeros(2)
    loss = F.dpo_loss(
        tensor([-10.0, -10.0]), z, z, z, loss_type="sft", chosen_lengths=tensor([10, 2]),
    )  # fmt: skip
    close(loss, 20 / 12)


# ---- the machine ----------------------------------------------------------------------------------------


def test_operations_are_counted():
    hidden, weight = torch.randn(6, 8).requires_grad_(), torch.randn(7, 8)
    with FlopCounterMode(display=False) as counter:
        F.linear_cross_entropy(hidden, weight, torch.arange(6)).backward()
    assert counter.get_total_flops() >= 2 * 6 * 7 * 8 * 2


def test_storages_outside_of_the_pool_can_be_resized():
    x = torch.randn(600, 1000).requires_grad_()
    before = memory.stats()["limit_bytes"]
    memory.set_limit(0)
    try:
        F.cross_entropy(x, torch.zeros(600).long()).backward()
    finally:
        memory.set_limit(before)
    x.grad.untyped_storage().resize_(0)
    assert x.grad.untyped_storage().size() == 0
