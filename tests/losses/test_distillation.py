"""Divergences of logits: their conventions, their end points, and classes of probability 0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import same_bits

from fastloss import reference
from fastloss.functional import js_div_logits, kl_div_logits


def draw(*shape, seed=0, dtype=torch.float64, device="cpu", scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * scale
    return [x.to(device, dtype).requires_grad_() for x in pair]


def trl(student, teacher, labels, beta, temperature):
    """As TRL's GKDTrainer.generalized_jsd_loss computes it."""
    q, p = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    if beta == 0:
        jsd = F.kl_div(q, p, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(p, q, reduction="none", log_target=True)
    else:
        b = torch.tensor(beta, dtype=q.dtype)
        m = torch.logsumexp(torch.stack([q + torch.log1p(-b), p + torch.log(b)]), dim=0)
        jsd = b * F.kl_div(m, p, reduction="none", log_target=True)
        jsd = jsd + (1 - b) * F.kl_div(m, q, reduction="none", log_target=True)
    mask = labels != -100
    return jsd[mask].sum() / mask.sum()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_is_what_trl_computes(beta, device):
    student, teacher = draw(2, 5, 19, device=device)
    labels = torch.tensor([[1, -100, 3, 4, 5], [6, 7, -100, -100, 0]], device=device)
    got = js_div_logits(student, teacher, beta, 0.7, labels=labels)
    expected = trl(student, teacher, labels, beta, 0.7)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, (student, teacher)), torch.autograd.grad(expected, (student, teacher))
    ):
        torch.testing.assert_close(a, b)


def test_kl_is_its_gradient(device):
    student, teacher = draw(4, 50, device=device)
    (grad,) = torch.autograd.grad(kl_div_logits(student, teacher, 2.0, "sum"), student)
    torch.testing.assert_close(grad, ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2)


def test_reductions(device):
    student, teacher = draw(2, 3, 9, device=device)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=device)
    weight = torch.tensor([[1.0, 9.0, 2.0], [0.5, 3.0, 9.0]], dtype=torch.float64, device=device)
    each = kl_div_logits(student, teacher, reduction="none", mask=mask, sample_weight=weight)
    plain = kl_div_logits(student, teacher, reduction="none")
    torch.testing.assert_close(each, plain * weight * mask)
    total = (weight * mask).sum()
    for reduction, expected in (("sum", 1.0), ("batchmean", total), ("mean", total * 9)):
        got = kl_div_logits(student, teacher, reduction=reduction, mask=mask, sample_weight=weight)
        torch.testing.assert_close(got, each.sum() / expected)
    assert kl_div_logits(student, teacher, mask=mask * 0).isnan()
    assert kl_div_logits(student, teacher, mask=mask * 0, reduction="sum") == 0


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_equal_distributions_are_at_distance_zero(beta, device):
    student, _ = draw(3, 40, device=device, dtype=torch.float32)
    loss = js_div_logits(student, student.detach() + 2.0, beta)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.abs() < 1e-6
    assert grad.abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_probability_zero(beta, dtype, device):
    """Classes that neither gives any probability, and classes that only one does not."""
    student, teacher = (x.detach() for x in draw(3, 300, device=device, dtype=dtype))
    student[:, 200:] = teacher[:, 200:] = -torch.inf
    student[1, :17] = teacher[1, :17] = -torch.inf  # a leading vector
    if beta > 0:
        student[2, 5:60] = -torch.inf
    if beta < 1:
        teacher[2, 70:90] = -torch.inf
    student.requires_grad_()
    teacher.requires_grad_()
    loss = js_div_logits(student, teacher, beta, reduction="sum")
    grads = torch.autograd.grad(loss, (student, teacher))
    assert loss.isfinite()
    assert loss > 0
    for grad, x in zip(grads, (student, teacher)):
        assert grad.isfinite().all()
        assert (grad[x == -torch.inf] == 0).all() or 0 < beta < 1 or x is teacher
    kept = js_div_logits(student[0, :200], teacher[0, :200], beta)
    each = js_div_logits(student, teacher, beta, reduction="none")
    torch.testing.assert_close(each[0], kept, rtol=1e-5, atol=1e-6)


def test_infinite_where_the_student_excludes_what_the_teacher_does_not(device):
    student, teacher = (x.detach() for x in draw(2, 8, device=device))
    student[0, 3] = -torch.inf
    each = kl_div_logits(student, teacher, reduction="none")
    assert each[0] == torch.inf
    assert each[1].isfinite()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_nan_shows(beta, device):
    student, teacher = (x.detach() for x in draw(2, 8, device=device))
    teacher[0, 3] = torch.nan
    each = js_div_logits(student, teacher, beta, reduction="none")
    assert each[0].isnan()
    assert each[1].isfinite()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_half_precision_is_summed_in_float(beta, device):
    student, teacher = (x.detach() for x in draw(4, 1000, device=device, dtype=torch.bfloat16))
    got = js_div_logits(student, teacher, beta, reduction="none")
    assert got.dtype == torch.float32
    exact = js_div_logits(student.double(), teacher.double(), beta, reduction="none")
    assert (got - exact).abs().max() < 2e-5


def test_gradient_is_the_same_from_forward_and_backward(device):
    """Written ahead for an upstream gradient of 1, and again for another."""
    student, teacher = draw(5, 130, device=device, dtype=torch.float32)
    for beta in (0.0, 0.5, 1.0):
        ahead = torch.autograd.grad(
            js_div_logits(student, teacher, beta, reduction="sum"), (student, teacher)
        )
        each = js_div_logits(student, teacher, beta, reduction="none")
        again = torch.autograd.grad(each, (student, teacher), torch.ones_like(each))
        alone = torch.autograd.grad(
            js_div_logits(student[3], teacher[3], beta, reduction="sum"), (student, teacher)
        )
        for a, b, c in zip(ahead, again, alone):
            assert same_bits(a, b)
            assert same_bits(a[3], c[3])


def test_only_the_gradient_that_is_wanted_and_strided_logits(device):
    student, teacher = draw(3, 4, 20, device=device)
    teacher = teacher.detach()
    loss = kl_div_logits(student[:, :-1], teacher.transpose(0, 1).contiguous().transpose(0, 1)[:, :-1])
    (grad,) = torch.autograd.grad(loss, student)
    whole = kl_div_logits(student[:, :-1].contiguous(), teacher[:, :-1].contiguous())
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(grad, torch.autograd.grad(whole, student)[0])


def test_errors():
    student, teacher = draw(2, 8)
    for match, options in (
        ("teacher_logits", {"teacher_logits": teacher[:, :7]}),
        ("labels", {"labels": torch.zeros(3, dtype=torch.int64)}),
        ("mask", {"mask": torch.ones(2, 8)}),
    ):
        with pytest.raises(RuntimeError, match=match):
            kl_div_logits(**{"student_logits": student, "teacher_logits": teacher} | options)
    for match, options in (
        ("beta", {"beta": 1.5}),
        ("temperature", {"temperature": 0.0}),
        ("reduction", {"reduction": "max"}),
    ):
        with pytest.raises(ValueError, match=match):
            js_div_logits(student, teacher, **options)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 5, 40])
def test_gradients_of_confident_rows(classes, beta, device):
    """Differences of log-ratios and their mean, nearly equal where one class has all the probability: as TRL's."""
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(400, classes, generator=generator) * 4 for _ in range(2)]
    labels = torch.zeros(400, dtype=torch.long)

    def gradients(function, dtype, where="cpu"):
        leaves = [x.to(where, dtype).requires_grad_() for x in pair]
        return [g.cpu().double() for g in torch.autograd.grad(function(*leaves), leaves)]

    exact = gradients(lambda s, t: reference.js_div_logits(s, t, beta), torch.float64)
    plain = gradients(lambda s, t: trl(s, t, labels, beta, 1.0), torch.float32)
    ours = gradients(lambda s, t: js_div_logits(s, t, beta), torch.float32, device)
    for got, eager, want in zip(ours, plain, exact, strict=True):
        error = (got - want).abs().amax(-1)
        assert error.sum() < 1.1 * (eager - want).abs().amax(-1).sum()
        if beta < 1:  # for 1 the teacher's is a difference of two probabilities
            assert (error <= 3e-5 * want.abs().amax(-1) + 1e-9 / len(want)).all()


@pytest.mark.parametrize("far", ["scaled", "moved"])
@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_gradients_of_logits_far_from_zero(beta, far, device):
    """No difference is taken of two large numbers: the error is no more than that of two log_softmax."""
    student, teacher = draw(50, 7, scale=2.0)
    student = (student.detach() * 300 if far == "scaled" else student.detach() + 3000).float()
    teacher = teacher.detach().float()
    labels = torch.zeros(50, dtype=torch.int64)

    def gradients(function, dtype, device="cpu"):
        pair = [x.to(device, dtype).requires_grad_() for x in (student, teacher)]
        value = function(*pair, beta=beta, temperature=1.0, labels=labels.to(device))
        return [g.double().cpu() for g in torch.autograd.grad(value, pair)]

    true, plain = gradients(trl, torch.float64), gradients(trl, torch.float32)
    for got, eager, exact in zip(gradients(js_div_logits, torch.float32, device), plain, true, strict=True):
        assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-9
