"""The recipes against loops over their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastloss import recipes
from fastloss.functional import sequence_log_probs


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_cringe_is_a_contrast_with_the_best_other_class():
    logits = draw(6, 9).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, -100, 8])
    labels[0] = logits[0].argmax()  # the negative label itself is the best
    got = recipes.cringe_loss(logits, labels, reduction="none")
    grad_rows = []
    for row, label in enumerate(labels.tolist()):
        if label == -100:
            assert got[row] == 0
            continue
        others = logits[row].clone()
        others[label] = -math.inf
        torch.testing.assert_close(got[row], F.softplus(logits[row, label] - others.max()))
        grad_rows.append({label, int(others.argmax())})
    (grad,) = torch.autograd.grad(recipes.cringe_loss(logits, labels), logits)
    touched = [set(g.nonzero().flatten().tolist()) for g in grad if (g != 0).any()]
    assert touched == grad_rows
    torch.testing.assert_close(recipes.cringe_loss(logits, labels), got.sum() / 5)


def test_cringe_draws_among_the_top_k_without_the_negative():
    logits = torch.tensor([[5.0, 4.0, 3.0, -9.0]]).expand(4000, 4)
    labels = torch.full((4000,), 1)
    generator = torch.Generator().manual_seed(0)
    losses = recipes.cringe_loss(logits, labels, top_k=2, reduction="none", generator=generator)
    against = -F.logsigmoid(torch.tensor([5.0 - 4.0, 3.0 - 4.0]))
    assert torch.isin(losses, against).all()
    fraction = (losses == against[0]).double().mean()
    assert abs(fraction - torch.tensor([5.0, 3.0]).softmax(0)[0]) < 0.02


def test_cringe_detaches_the_positive():
    logits = draw(3, 5).requires_grad_()
    loss = recipes.cringe_loss(logits, torch.tensor([0, 1, 2]), detach_positive=True)
    (grad,) = torch.autograd.grad(loss, logits)
    assert ((grad != 0).sum(-1) == 1).all()
    assert recipes.cringe_loss(logits, torch.full((3,), -100)) == 0
    with pytest.raises(ValueError, match="top_k"):
        recipes.cringe_loss(logits, torch.tensor([0, 1, 2]), top_k=5)


def test_cringe_of_tokens_that_do_not_count():
    """What stands at ignored tokens matters nowhere; NaN at others is not hidden, nor is it an error."""
    labels = torch.tensor([1, -100, 0])
    results = []
    for held in (0.0, math.nan, math.inf, -math.inf, 1e38):
        logits = draw(3, 5).float()
        logits[1] = held
        logits.requires_grad_()
        loss = recipes.cringe_loss(logits, labels, top_k=1)
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        results.append((loss, grad, torch.autograd.grad(grad.square().sum(), logits)[0]))
        assert all(torch.equal(x, y) for x, y in zip(results[0], results[-1], strict=True)), held
    logits = draw(3, 5)
    logits[0, 2] = math.nan
    assert recipes.cringe_loss(logits, labels, 2, reduction="none").isnan().tolist() == [True, False, False]


def test_cringe_adds_up_in_single_precision():
    """65504 is the largest float16: their sum is too large for it, their mean is not."""
    logits = torch.tensor([[60000.0, 0.0, 0.0]], dtype=torch.float16).expand(4, 3)
    assert recipes.cringe_loss(logits, torch.zeros(4, dtype=torch.int64)).item() == 60000.0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda i: recipes.cringe_loss(torch.zeros(2, 3), i), "negative_labels"),
        (lambda i: recipes.rog_loss(torch.zeros(3), torch.zeros(2), i), "path_question"),
        (
            lambda i: recipes.q_learning_loss(torch.zeros(2, 3), i, torch.zeros(2), torch.zeros(2, 3)),
            "actions",
        ),
    ],
)
def test_numbers_out_of_bounds_are_named(call, name):
    call(torch.tensor([0, 2]))
    for bad in ([0, 3], [-1, 0]):
        with pytest.raises(IndexError, match=rf"{name}: expected numbers in \[0, 3\)"):
            call(torch.tensor(bad))
    with pytest.raises(TypeError, match=name):
        call([0, 1])


def test_cringe_hinge():
    chosen, rejected = torch.tensor([-1.0, -5.0]), torch.tensor([-4.0, -4.5])
    torch.testing.assert_close(recipes.cringe_hinge_loss(chosen, rejected), torch.tensor(1.5 / 2))


def test_rog_averages_the_paths_of_each_question():
    answers, paths = draw(3).requires_grad_(), draw(4).requires_grad_()
    owner = torch.tensor([0, 2, 0, 0])
    plans = torch.stack([paths[[0, 2, 3]].mean(), torch.zeros((), dtype=torch.float64), paths[1]])
    torch.testing.assert_close(recipes.rog_loss(answers, paths, owner), -(answers + plans).mean())
    grads = torch.autograd.grad(recipes.rog_loss(answers, paths, owner), (answers, paths))
    torch.testing.assert_close(grads[0], torch.full((3,), -1 / 3, dtype=torch.float64))
    torch.testing.assert_close(grads[1], torch.tensor([-1 / 9, -1 / 3, -1 / 9, -1 / 9], dtype=torch.float64))


def test_rog_adds_up_in_double_precision():
    """Sums of paths in order, as exact as their rounded mean; of half types too."""
    paths = 1000 + draw(3000).float()
    owner = torch.arange(3000) % 3
    for dtype in (torch.float32, torch.bfloat16):
        x = paths.to(dtype)
        got = recipes.rog_loss(torch.zeros(3, dtype=dtype), x, owner)
        torch.testing.assert_close(got, -x.double().mean().to(dtype), rtol=0, atol=0)


def test_deep_rag():
    logits, labels = draw(2, 3, 7), torch.tensor([[1, -100, 3], [4, 5, -100]])
    summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(recipes.deep_rag_imitation_loss(logits, labels), summed / 2)
    policy = sequence_log_probs(logits, labels)
    zero = torch.zeros_like(policy)
    loss = recipes.deep_rag_calibration_loss(policy[:1], policy[1:], zero[:1], zero[1:])
    torch.testing.assert_close(loss, F.softplus(-0.4 * (policy[0] - policy[1])))


def test_ppo_total_is_its_three_terms():
    lp, old, a, v, ret, h = (draw(6, 4, 7)[i] for i in range(6))
    inputs = lp.requires_grad_(), v.requires_grad_(), h.requires_grad_()
    mask = torch.arange(28).view(4, 7) % 3 > 0
    old_v = v.detach() + 0.3 * old
    got = recipes.ppo_total_loss(lp, old, a, v, ret, old_v, h, mask, value_coef=0.7, entropy_coef=0.2)
    rho = (lp - old).exp()
    policy = -torch.min(rho * a, rho.clamp(0.8, 1.2) * a)
    held = old_v + (v - old_v).clamp(-0.2, 0.2)
    value = 0.5 * torch.max((v - ret) ** 2, (held - ret) ** 2)
    wanted = ((policy + 0.7 * value - 0.2 * h) * mask).sum() / mask.sum()
    torch.testing.assert_close(got, wanted)
    for x, y in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("delta", [None, 0.5])
def test_q_learning(double, delta):
    q, target, online, r = draw(4, 9, 5)[0], draw(4, 9, 5)[1], draw(4, 9, 5)[2], draw(9)
    q.requires_grad_()
    actions, end = torch.arange(9) % 5, torch.arange(9) % 4 == 0
    best = online.argmax(-1) if double else target.argmax(-1)
    goal = r + 0.9 * torch.where(end, 0.0, target[torch.arange(9), best])
    error = goal - q[torch.arange(9), actions]
    wanted = 0.5 * error**2 if delta is None else F.huber_loss(error, 0 * error, "none", delta=delta)
    got = recipes.q_learning_loss(
        q, actions, r, target, end, gamma=0.9, next_q_online=online if double else None, huber_delta=delta
    )
    torch.testing.assert_close(got, wanted.mean())
    torch.testing.assert_close(*(torch.autograd.grad(x, q)[0] for x in (got, wanted.mean())))
    with pytest.raises(RuntimeError, match="actions"):
        recipes.q_learning_loss(q, actions.float(), r, target)
    with pytest.raises(RuntimeError, match="rewards"):
        recipes.q_learning_loss(q, actions, r[:1], target)


def test_reward_regression():
    rewards, scores = draw(5).requires_grad_(), 3 * draw(5).flip(0) + 7
    loss = recipes.reward_regression_loss(rewards, scores, center=7.0, scale=3.0)
    torch.testing.assert_close(loss, F.mse_loss(rewards, (scores - 7) / 3))
    with pytest.raises(RuntimeError, match="scores"):
        recipes.reward_regression_loss(rewards, scores[:1])


def test_multi_task():
    losses = draw(3).requires_grad_()
    torch.testing.assert_close(recipes.multi_task_loss(losses), losses.sum())
    weighted = recipes.multi_task_loss(losses.unbind(), [1.0, 0.5, 2.0])
    torch.testing.assert_close(weighted, losses[0] + 0.5 * losses[1] + 2 * losses[2])
    assert torch.autograd.grad(weighted, losses)[0].tolist() == [1.0, 0.5, 2.0]
    with pytest.raises(RuntimeError, match="weights"):
        recipes.multi_task_loss(losses, [1.0])


def test_initial_balance_is_fixed_by_the_first_call():
    balance = recipes.InitialBalance()
    main, auxiliary = (torch.tensor(x, requires_grad=True) for x in (6.0, 2.0))
    assert balance(torch.tensor(1.0), torch.tensor(0.0)) == 1.0  # no ratio yet
    total = balance(main, auxiliary)
    assert total.item() == 12.0
    assert torch.autograd.grad(total, (main, auxiliary)) == (1.0, 3.0)
    assert balance(torch.tensor(1.0), torch.tensor(5.0)).item() == 16.0
    restored = recipes.InitialBalance()
    restored.load_state_dict(balance.state_dict())
    assert restored(torch.tensor(1.0), torch.tensor(5.0)).item() == 16.0


def test_regularization_of_half_types():
    """A sum of absolute values past the largest float16, and bits that bfloat16 does not have."""
    ones = [torch.ones(70001, dtype=torch.float16), torch.ones(300, dtype=torch.bfloat16)]
    assert recipes.l1_regularization(ones, 1.0).item() == 70301.0
    torch.testing.assert_close(recipes.l2_regularization(ones, 1.0).item(), 70301.0)


def test_regularization():
    parameters = [draw(3, 4).requires_grad_(), torch.zeros(2, dtype=torch.float64, requires_grad=True)]
    for function, slope in (
        (recipes.l1_regularization, torch.sign),
        (recipes.l2_regularization, lambda w: 2 * w),
    ):
        loss = function(iter(parameters), 0.25)
        power = 1 if function is recipes.l1_regularization else 2
        torch.testing.assert_close(loss, 0.25 * sum(w.abs().pow(power).sum() for w in parameters))
        for g, w in zip(torch.autograd.grad(loss, parameters), parameters, strict=True):
            torch.testing.assert_close(g, 0.25 * slope(w.detach()))
