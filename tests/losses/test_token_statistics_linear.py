"""Statistics and DPO from hidden states: against the reference, in chunks, masked, frozen, transformed."""

from __future__ import annotations

import pytest
import torch
from support import same_bits

from fastloss import reference
from fastloss._ops import chunked_linear
from fastloss.functional import linear_dpo_loss, linear_token_stats, token_stats


def problem(dtype=torch.float64, device="cpu", rows=(3, 7), features=10, classes=93):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, features, generator=g, dtype=torch.float64)
    w = torch.randn(classes, features, generator=g, dtype=torch.float64)
    b = torch.randn(classes, generator=g, dtype=torch.float64)
    index = torch.randint(classes, (*rows, 2), generator=g)
    mask = torch.rand(rows, generator=g) < 0.6
    return *(t.to(device, dtype).requires_grad_() for t in (x, w, b)), index.to(device), mask.to(device)


def combined(stats):
    """One number of all that is differentiable."""
    logp, entropy, lse, p2, mean, _ = stats
    return (logp * logp).sum() + (entropy * lse).sum() + (p2 * mean).sum()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
def test_all_statistics(masked, softcap, device):
    x, w, b, index, mask = problem(device=device)
    options = {"linear_bias": b, "mask": mask if masked else None, "softcap": softcap}
    ours = linear_token_stats(x, w, index, 0.7, **options)
    theirs = reference.linear_token_stats(x, w, index, 0.7, **options)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(
        torch.autograd.grad(combined(ours), (x, w, b)),
        torch.autograd.grad(combined(theirs), (x, w, b)),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_one_class_for_each_row_and_none(device):
    x, w, _, index, _ = problem(device=device)
    one = linear_token_stats(x, w, index[..., 0])
    assert one.logp.shape == x.shape[:-1] and one.is_top1.shape == x.shape[:-1]
    assert same_bits(one.logp, linear_token_stats(x, w, index).logp[..., 0])
    assert linear_token_stats(x, w).logp is None
    assert linear_token_stats(x[0, 0], w, index[0, 0, 0]).entropy.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_chunks_change_no_row(dtype, device, monkeypatch):
    x, w, _, index, mask = problem(dtype, device, (40,))
    answers = []
    for size in (1, 7, 100):
        monkeypatch.setattr(chunked_linear, "rows_of_a_chunk", lambda *_, size=size: size)
        stats = linear_token_stats(x, w, index, mask=mask)
        answers.append((stats.logp, stats.entropy, torch.autograd.grad(combined(stats), x)[0]))
    for answer in answers[1:]:
        assert all(same_bits(a, e) for a, e in zip(answer, answers[0], strict=True))


def test_masked_rows_are_not_multiplied(monkeypatch):
    x, w, _, index, mask = problem()
    seen = []
    real = chunked_linear.PackedProducts.logits
    monkeypatch.setattr(
        chunked_linear.PackedProducts,
        "logits",
        lambda self, out, x: seen.append(len(x)) or real(self, out, x),
    )
    combined(linear_token_stats(x, w, index, mask=mask)).backward()
    assert seen == [int(mask.sum())] * 2
    assert x.grad[~mask].eq(0).all() and x.grad[mask].ne(0).any()


def test_nothing_counts(device):
    x, w, _, index, mask = problem(device=device)
    stats = linear_token_stats(x, w, index, mask=torch.zeros_like(mask))
    assert all(t.eq(0).all() for t in stats)
    assert all(g.eq(0).all() for g in torch.autograd.grad(combined(stats), (x, w)))
    empty = linear_token_stats(x[:0], w, index[:0])
    assert empty.logp.shape == (0, 7, 2)
    assert torch.autograd.grad(combined(empty), w)[0].eq(0).all()


def test_frozen_weight_costs_no_product(monkeypatch):
    x, w, _, index, _ = problem()
    monkeypatch.setattr(
        chunked_linear.PackedProducts, "weight_gradient", lambda *_: pytest.fail("not wanted")
    )
    stats = linear_token_stats(x, w.detach(), index)
    expected = token_stats(x.detach() @ w.detach().t(), index)
    torch.testing.assert_close(stats.logp, expected.logp)
    combined(stats).backward()
    assert x.grad.isfinite().all()


def test_transforms(real_device):
    x, w, _, index, _ = problem(device=real_device, rows=(3,), classes=9)

    def ours(x, w, index):
        return combined(linear_token_stats(x, w, index))

    def theirs(x, w, index):
        return combined(token_stats(x @ w.t(), index))

    args = x.detach(), w.detach(), index
    for transform in (
        lambda f: torch.func.grad(f, (0, 1)),
        lambda f: torch.func.vmap(f, (0, None, 0)),
        lambda f: torch.func.vmap(torch.func.grad(f, (0, 1)), (0, None, 0)),
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
    ):
        torch.testing.assert_close(transform(ours)(*args), transform(theirs)(*args))
    assert torch.autograd.gradgradcheck(
        lambda x, w: linear_token_stats(x, w, index)[:3], (x, w), raise_exception=True
    )


def test_a_class_out_of_bounds():
    x, w, _, index, _ = problem()
    index[0, 0, 0] = 93
    with pytest.raises(IndexError, match=r"index: .*out of bounds"):
        linear_token_stats(x, w, index)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero"])
def test_dpo_is_that_of_whole_answers(loss_type):
    """As composed by hand from the full logits, the reference model's log-probabilities differentiable too."""
    g = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(3, t, 6, generator=g, dtype=torch.float64) for t in (4, 5))
    w = torch.randn(30, 6, generator=g, dtype=torch.float64).requires_grad_()
    labels = [torch.randint(30, h.shape[:2], generator=g) for h in (chosen, rejected)]
    labels[0][:, -1] = labels[1][0] = -100
    known = [torch.randn(3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    args = chosen, rejected, w, *labels, *known
    ours = linear_dpo_loss(*args, loss_type=loss_type)
    theirs = reference.linear_dpo_loss(*args, loss_type=loss_type)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (w, *known)), torch.autograd.grad(theirs, (w, *known))
    )
