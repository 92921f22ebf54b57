"""token_stats and the functions that use it: definitions, joint derivatives, edges, strides."""

from __future__ import annotations

import math

import pytest
import torch
from support import same_bits

from fastloss import reference
from fastloss.functional import (
    entropy_from_logits,
    selective_log_softmax,
    sequence_log_probs,
    token_stats,
)

FIELDS = ("logp", "entropy", "lse", "log_sum_p2", "mean_logit")


def draw(*shape, dtype=torch.float64, device="cpu", scale=3.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1, 7, 4099])
def test_every_statistic_is_its_definition(v, dtype, device):
    x = draw(3, v, dtype=dtype, device=device)
    index = torch.tensor([0, v - 1, v // 2], device=device)
    got = token_stats(x, index, 0.7)
    z = x.double() / 0.7
    logp = z.log_softmax(-1)
    expected = {
        "logp": logp.gather(-1, index[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "lse": z.logsumexp(-1),
        "log_sum_p2": logp.exp().square().sum(-1).log(),
        "mean_logit": z.mean(-1),
    }
    for name, value in expected.items():
        have = getattr(got, name)
        assert have.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(have.double(), value, rtol=tolerance, atol=tolerance)
    assert torch.equal(got.is_top1, z.argmax(-1) == index)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("width", [None, 4])
def test_joint_backward(width, softcap, device):
    """Any upstream gradients at once, a repeated class, a masked row; first and second derivatives."""
    x = draw(2, 3, 9, device=device).requires_grad_()
    index = torch.randint(9, (2, 3) if width is None else (2, 3, width), device=device)
    if width:
        index[..., 1] = index[..., 0]
    mask = torch.tensor([[True, True, False], [True, False, True]], device=device)

    def total(function, x):
        s = function(x, index, 0.6, mask=mask, softcap=softcap)
        weights = (draw(*getattr(s, n).shape, device=device) * (i + 1) for i, n in enumerate(FIELDS))
        return sum((getattr(s, n) * w).sum() for n, w in zip(FIELDS, weights, strict=True))

    value, expected = total(token_stats, x), total(reference.token_stats, x)
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    (wanted,) = torch.autograd.grad(expected, x, create_graph=True)
    torch.testing.assert_close(grad, wanted)
    assert (grad[~mask] == 0).all()
    torch.testing.assert_close(
        torch.autograd.grad(grad.square().sum(), x)[0], torch.autograd.grad(wanted.square().sum(), x)[0]
    )


@pytest.mark.parametrize("name", FIELDS)
def test_each_statistic_has_its_own_gradient(name, device):
    x = draw(4, 33, device=device).requires_grad_()
    index = torch.tensor([0, 5, 32, 7], device=device)
    grads = [
        torch.autograd.grad(getattr(f(x, index), name).sum(), x)[0]
        for f in (token_stats, reference.token_stats)
    ]
    torch.testing.assert_close(*grads)


def test_minus_infinity_adds_nothing(device):
    x = draw(3, 40, device=device)
    x[:, ::2] = -torch.inf
    x[2, 1:] = -torch.inf
    x[2, 0] = 1.0
    x.requires_grad_()
    entropy = entropy_from_logits(x)
    logp = x[:2, 1::2].log_softmax(-1)
    torch.testing.assert_close(entropy[:2], -(logp.exp() * logp).sum(-1))
    assert entropy[2] == 0
    (grad,) = torch.autograd.grad(entropy.sum(), x)
    assert grad.isfinite().all()
    assert (grad[:2, ::2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [17.0, 40.0, 80.0])
def test_confident_classes_keep_their_relative_precision(margin, dtype, device):
    x = torch.tensor([[0.0, margin, 0.0]], dtype=dtype, device=device, requires_grad=True)
    logp = selective_log_softmax(x, torch.tensor([[1, 0]], device=device))
    nll = 2 * torch.exp(torch.tensor(-margin, dtype=torch.float64))
    torch.testing.assert_close(-logp[0, 0].double().cpu(), nll, rtol=1e-6, atol=0.0)
    (grad,) = torch.autograd.grad(logp[0, 0], x)
    torch.testing.assert_close(grad[0, 1].double().cpu(), nll, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("margin", [1.0, 30.0, 60.0, 80.0])
@pytest.mark.parametrize(
    "entropy", [entropy_from_logits, reference.entropy_from_logits], ids=["", "reference"]
)
def test_entropy_of_confident_rows_keeps_its_relative_precision(entropy, margin, device):
    """Of two classes, q = sigmoid(-margin): softplus(-margin) + q margin; the gradient is -p q margin."""
    logits = torch.tensor([margin, 0.0], dtype=torch.float64, device=device).requires_grad_()
    q = 1 / (1 + math.exp(margin))
    value = entropy(logits)
    (grad,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(math.log1p(math.exp(-margin)) + q * margin, rel=1e-13, abs=0)
    of_best = -(1 - q) * q * margin
    assert grad.tolist() == pytest.approx([of_best, -of_best], rel=1e-13, abs=0)


def test_half_types_are_as_good_as_float32(device):
    x = draw(16, 1030, dtype=torch.bfloat16, device=device)
    index = torch.arange(16, device=device)
    exact = selective_log_softmax(x.double(), index)
    assert (selective_log_softmax(x, index).double() - exact).abs().max() < 2e-5


def test_shifted_logits_are_not_copied(device):
    """Rows with a gap between sequences, as in next-token prediction."""
    x = draw(3, 5, 9, dtype=torch.float32, device=device)
    labels = torch.randint(9, (3, 5), device=device)
    for part, index in ((x[:, :-1], labels[:, 1:]), (x.transpose(0, 1), labels.T), (x[..., ::2], labels % 5)):
        leaf = part.detach().requires_grad_()
        dense = part.contiguous().requires_grad_()
        got, expected = (selective_log_softmax(p, index) for p in (leaf, dense))
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(v.square().sum(), p)[0] for v, p in ((got, leaf), (expected, dense))]
        torch.testing.assert_close(*grads)


def test_sequences(device):
    logits = draw(3, 4, 11, device=device).requires_grad_()
    labels = torch.randint(11, (3, 4), device=device)
    labels[0, 2:] = -100
    labels[1] = -100
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1))[..., 0] * (labels != -100)
    total = sequence_log_probs(logits, labels)
    torch.testing.assert_close(total, logp.sum(-1))
    assert total[1] == 0
    average = sequence_log_probs(logits, labels, average=True)
    torch.testing.assert_close(average, logp.sum(-1) / torch.tensor([2.0, 1.0, 4.0], device=device))
    weights = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, device=device)
    grads = [
        torch.autograd.grad((v * weights).sum(), logits, retain_graph=True)[0] for v in (total, logp.sum(-1))
    ]
    torch.testing.assert_close(*grads)


def test_rows_do_not_depend_on_each_other(device):
    x = draw(5, 1030, dtype=torch.float32, device=device)
    index = torch.arange(5, device=device)
    together, alone = token_stats(x, index), token_stats(x[3:4], index[3:4])
    assert all(same_bits(getattr(together, n)[3:4], getattr(alone, n)) for n in FIELDS)


def test_errors(device):
    x, index = draw(2, 3, device=device), torch.tensor([0, 1], device=device)
    with pytest.raises(RuntimeError, match="index"):
        token_stats(x, torch.tensor([[0]], device=device))
    with pytest.raises(RuntimeError, match="index"):
        token_stats(x, index.int())
    with pytest.raises(RuntimeError, match="mask"):
        token_stats(x, index, mask=torch.ones(3, device=device))
    with pytest.raises(ValueError, match="temperature"):
        token_stats(x, index, 0.0)
    with pytest.raises(NotImplementedError, match="logits"):
        token_stats(x.long(), index)
    with pytest.raises(RuntimeError, match="labels"):
        sequence_log_probs(x, index[:, None])
    assert token_stats(x[:0]).entropy.shape == (0,)


def test_class_out_of_bounds(device):
    x, index = draw(2, 3, device=device), torch.tensor([0, 3], device=device)
    try:
        logp = token_stats(x, index).logp
    except IndexError as error:
        assert "index 3 is out of bounds" in str(error)
    else:  # a look at the indices would wait for the device
        assert logp[1].isnan()
        assert logp[0].isfinite()
