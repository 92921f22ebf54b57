"""A vocabulary over two processes: values and gradients of one process; and what they are asked for."""

from __future__ import annotations

import pytest
import torch
from support import same_bits
from support.ranks import be_a_rank, run_ranks

import fastloss
from fastloss import distributed, functional

CLASSES = 45
CUT = 17  # slices of unequal size
SHARE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def slices(rank):
    return (0, CUT) if rank == 0 else (CUT, CLASSES)


def problem(dtype, scale=1.0):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(13, 8, generator=g, dtype=torch.float64)
    w = torch.randn(CLASSES, 8, generator=g, dtype=torch.float64)
    b = torch.randn(CLASSES, generator=g, dtype=torch.float64)
    logits = scale * torch.randn(13, CLASSES, generator=g, dtype=torch.float64)
    target = torch.randint(CLASSES, (13,), generator=g)
    return [t.to(dtype) for t in (x, w, b, logits)], target


def close(got, expected, dtype, what):
    error = (got.double() - expected.double()).abs().max()
    assert error <= SHARE[dtype] * expected.double().abs().max(), f"{what}: {error}"


def check_cross_entropy(rank, dtype, reduction, scale):
    (*_, logits), target = problem(dtype, scale)
    target[::4] = -100
    begin, end = slices(rank)
    mine, whole = (t.detach().clone().requires_grad_() for t in (logits[:, begin:end], logits))
    options = {"reduction": reduction, "logit_scale": 0.7, "softcap": 30.0}
    ours = distributed.cross_entropy(mine, target, first_class=begin, **options)
    theirs = functional.cross_entropy(whole, target, **options)
    upstream = torch.linspace(0.5, 1.5, max(ours.numel(), 1), dtype=dtype).view(ours.shape)
    ours.backward(upstream)
    theirs.backward(upstream)
    close(ours, theirs, dtype, f"value {dtype} {reduction} {scale}")
    close(mine.grad, whole.grad[:, begin:end], dtype, f"gradient {dtype} {reduction} {scale}")


def check_linear(rank, dtype, reduction):
    (x, w, b, _), target = problem(dtype)
    target[1] = -100
    begin, end = slices(rank)
    mine = [t.detach().clone().requires_grad_() for t in (x, w[begin:end], b[begin:end])]
    whole = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    ours = distributed.linear_cross_entropy(
        *mine[:2], target, linear_bias=mine[2], reduction=reduction, first_class=begin
    )
    theirs = functional.linear_cross_entropy(*whole[:2], target, linear_bias=whole[2], reduction=reduction)
    ours.sum().backward()
    theirs.sum().backward()
    close(ours, theirs, dtype, "value")
    for part, full, name in zip(mine, whole, ("input", "weight", "bias"), strict=True):
        close(part.grad, full.grad if name == "input" else full.grad[begin:end], dtype, f"gradient of {name}")
    everywhere = distributed.all_gather(ours.detach().reshape(-1))
    assert same_bits(*everywhere.chunk(2)), "every rank has the same loss"
    everywhere = distributed.all_gather(mine[0].grad)
    assert same_bits(*everywhere.chunk(2)), "and the same gradient of what they share"


def check_extremes(rank):
    """A target that wins or loses by far, alone in its slice or not; slices of -inf; no row that counts."""
    for margin in (60.0, -60.0, 1e4, -1e4):
        for y in (3, 20):
            logits = torch.zeros(1, 40)
            logits[0, y] = margin
            target = torch.tensor([y])
            mine, whole = (
                t.clone().requires_grad_() for t in (logits[:, 20 * rank : 20 * rank + 20], logits)
            )
            ours = distributed.cross_entropy(mine, target)
            theirs = functional.cross_entropy(whole, target)
            ours.backward()
            theirs.backward()
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
            torch.testing.assert_close(
                mine.grad, whole.grad[:, 20 * rank : 20 * rank + 20], rtol=1e-5, atol=1e-30
            )
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    hidden = torch.full_like(logits, -torch.inf) if rank else logits
    loss = distributed.cross_entropy(hidden, torch.tensor([1, 2]))
    torch.testing.assert_close(loss, functional.cross_entropy(logits, torch.tensor([1, 2])))
    none = distributed.cross_entropy(logits, torch.full((2,), -100))
    assert none.isnan()
    empty = distributed.cross_entropy(logits[:0], torch.empty(0, dtype=torch.int64), reduction="sum")
    assert empty == 0


def check_sizes_of_slices(rank):
    """Slices of any size come in the order of ranks, whether or not it is said where each begins."""
    (x, w, b, logits), target = problem(torch.float64)
    for cut in (CUT, CLASSES - CUT, 1):
        begin, end = ((0, cut), (cut, CLASSES))[rank]
        mine, whole = (t.detach().clone().requires_grad_() for t in (logits[:, begin:end], logits))
        ours, theirs = distributed.cross_entropy(mine, target), functional.cross_entropy(whole, target)
        ours.backward()
        theirs.backward()
        close(ours, theirs, torch.float64, f"value, {cut} classes of rank 0")
        torch.testing.assert_close(mine.grad, whole.grad[:, begin:end], rtol=1e-13, atol=1e-15)
        ours = distributed.linear_cross_entropy(x, w[begin:end], target, linear_bias=b[begin:end])
        close(ours, functional.linear_cross_entropy(x, w, target, linear_bias=b), torch.float64, "linear")


def check_slice_without_mass(rank):
    """Classes of one rank that are all switched off, as the padding of a vocabulary is, get a gradient of 0."""
    (x, w, _, logits), target = problem(torch.float64)
    target %= 20
    target[3] = -100
    off = torch.zeros(CLASSES, dtype=torch.float64)
    off[20:] = -torch.inf
    rows = slice(0, 20) if rank == 0 else slice(20, None)
    for dead in (slice(None), slice(5)):  # in all rows, or in some
        z = logits.clone()
        z[dead] += off
        mine, whole = z[:, rows].clone().requires_grad_(), z.clone().requires_grad_()
        ours, theirs = distributed.cross_entropy(mine, target), functional.cross_entropy(whole, target)
        ours.backward()
        theirs.backward()
        close(ours, theirs, torch.float64, "value")
        torch.testing.assert_close(mine.grad, whole.grad[:, rows], rtol=1e-13, atol=1e-15)
    mine = [t.clone().requires_grad_() for t in (x, w[rows], off[rows])]
    whole = [t.clone().requires_grad_() for t in (x, w, off)]
    distributed.linear_cross_entropy(*mine[:2], target, linear_bias=mine[2]).backward()
    functional.linear_cross_entropy(*whole[:2], target, linear_bias=whole[2]).backward()
    close(mine[0].grad, whole[0].grad, torch.float64, "gradient of input")
    for part, full in zip(mine[1:], whole[1:], strict=True):
        torch.testing.assert_close(part.grad, full.grad[rows], rtol=1e-13, atol=1e-15)


def check_errors(rank):
    logits = torch.zeros(2, 20)
    for target in ([0, 40], [0, -1]):
        with pytest.raises(IndexError, match="out of bounds"):
            distributed.cross_entropy(logits, torch.tensor(target))
    with pytest.raises(IndexError, match="exactly one rank"):
        distributed.cross_entropy(logits, torch.tensor([0, 1]), first_class=0)
    with pytest.raises(ValueError, match="target"):
        distributed.cross_entropy(logits, torch.tensor([0]))
    with pytest.raises(TypeError, match="first_class"):
        distributed.cross_entropy(logits, torch.tensor([0, 1]), first_class=0.5)
    x = torch.zeros(2, 20, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(distributed.cross_entropy(x, torch.tensor([0, 1])), x, create_graph=True)


def check_for_ddp(rank):
    """Whether gradients are averaged is not known here, and nothing is assumed; of one rank it does not matter."""
    x, y = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    for name, rest in (
        ("clip_loss", (1.0,)),
        ("siglip_loss", (1.0,)),
        ("info_nce", ()),
        ("nt_xent_loss", ()),
    ):
        with pytest.raises(TypeError, match="for_ddp: expected True or False with 2 ranks"):
            getattr(distributed, name)(x, y, *rest)
    gradients = []
    for for_ddp in (False, True):
        features = x.clone().requires_grad_()
        distributed.clip_loss(features, y, 1.0, for_ddp=for_ddp).backward()
        gradients.append(features.grad)
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def check_all_gather(rank):
    x = (torch.arange(6.0).view(2, 3) + 10 * rank).requires_grad_()
    together = distributed.all_gather(x)
    assert torch.equal(together, torch.cat([torch.arange(6.0).view(2, 3) + 10 * r for r in range(2)]))
    weight = torch.arange(12.0).view(4, 3) * (rank + 1)
    (together * weight).sum().backward()
    expected = torch.arange(12.0).view(4, 3) * 3
    assert torch.equal(x.grad, expected[2 * rank : 2 * rank + 2])


def check_profile(rank):
    """A profile sees both passes: the statistics of this rank's slice, and what the ranks put together."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    with fastloss.profile() as p:
        distributed.cross_entropy(logits, torch.tensor([0, 25, 39])).backward()
    assert [c.loss for c in p.calls] == ["cross_entropy"] * 2
    assert [c.operator for c in p.calls] == ["token_stats", "vocabulary_parallel_nll"]
    assert all(c.forward.ms > 0 and c.backward[0].ms > 0 for c in p.calls)


def work(rank: int, _: int) -> None:
    for dtype in SHARE:
        for reduction in ("none", "mean", "sum"):
            check_cross_entropy(rank, dtype, reduction, 3.0)
            check_linear(rank, dtype, reduction)
    check_cross_entropy(rank, torch.float64, "mean", 200.0)
    check_extremes(rank)
    check_sizes_of_slices(rank)
    check_slice_without_mass(rank)
    check_errors(rank)
    check_for_ddp(rank)
    check_all_gather(rank)
    check_profile(rank)


def test_two_processes(tmp_path):
    run_ranks(__file__, 2, tmp_path)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


if __name__ == "__main__":
    be_a_rank(work)
