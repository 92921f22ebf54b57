"""`ClipLoss` and `SigLipLoss` with open_clip's constructors and calls, in one process and in two."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import be_a_rank, run_ranks
from torch.distributed.nn import all_gather

from fastloss import nn

SIZE, ROWS, FEATURES = 2, 3, 5


def features(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE * ROWS, FEATURES, generator=generator, dtype=torch.float64)


def clip(x, y, all_x, all_y, scale, first):
    """The loss of pairs whose images and texts stand among all from row `first` on."""
    labels = torch.arange(x.shape[0]) + first
    return (F.cross_entropy(scale * x @ all_y.T, labels) + F.cross_entropy(scale * y @ all_x.T, labels)) / 2


def clip_as_open_clip(x, y, scale, rank, local_loss, gather_with_grad):
    """Compute the loss of a rank as the formulas of open_clip's `gather_features` and `ClipLoss` have it."""
    everyone = []
    for own in (x, y):
        parts = list(all_gather(own if gather_with_grad else own.detach()))
        if not gather_with_grad and not local_loss:
            parts[rank] = own
        everyone.append(torch.cat(parts))
    if local_loss:
        return clip(x, y, *everyone, scale, rank * ROWS)
    return clip(*everyone, *everyone, scale, 0)


def siglip(x, all_y, scale, bias, first):
    match = torch.zeros(x.shape[0], all_y.shape[0], dtype=torch.float64)
    match[torch.arange(x.shape[0]), torch.arange(x.shape[0]) + first] = 2
    return -F.logsigmoid((match - 1) * (scale * x @ all_y.T + bias)).sum() / x.shape[0]


def of_own_rows(rank):
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    numbers = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    return [t.clone().requires_grad_() for t in (features(1)[rows], features(2)[rows], *numbers)]


def averaged(number):
    total = number.clone()
    dist.all_reduce(total)
    return total / SIZE


def same_as(ours, theirs, mine, other, what):
    """Value, the features' gradients, and those of scale and bias as DistributedDataParallel averages them."""
    close = {"rtol": 1e-10, "atol": 1e-12, "msg": lambda text: f"{what}: {text}"}
    torch.testing.assert_close(ours, theirs, **close)
    ours.backward()
    theirs.backward()
    for a, b in zip(mine[:2], other[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, **close)
    for a, b in zip(mine[2:], other[2:], strict=True):
        if b.grad is not None:
            torch.testing.assert_close(averaged(a.grad), averaged(b.grad), **close)


def work(rank, size):
    for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
        mine, other = of_own_rows(rank), of_own_rows(rank)
        module = nn.ClipLoss(local_loss, gather_with_grad, True, rank, size)
        theirs = clip_as_open_clip(*other[:3], rank, local_loss, gather_with_grad)
        what = f"local_loss={local_loss}, gather_with_grad={gather_with_grad}"
        same_as(module(*mine), theirs, mine, other, what)
        # the gradient of one process
        whole = [t.requires_grad_() for t in (features(1), features(2))]
        clip(*whole, *whole, 3.0, 0).backward()
        own = whole[0].grad[rank * ROWS : (rank + 1) * ROWS]
        assert torch.allclose(mine[0].grad, own * size) == gather_with_grad, what
    for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
        mine, other = of_own_rows(rank), of_own_rows(rank)
        module = nn.SigLipLoss(True, rank, size, dist_impl)
        x, y, scale, bias = other
        theirs = siglip(x, torch.cat(list(all_gather(y))), scale, bias, rank * ROWS)
        same_as(module(*mine), theirs, mine, other, f"dist_impl={dist_impl}")
    x, y, scale, bias = of_own_rows(rank)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    for cls, options in ((nn.ClipLoss, {"local_loss": True, "gather_with_grad": True}), (nn.SigLipLoss, {})):
        rows, total, mean = (
            cls(rank=rank, world_size=size, reduction=reduction, **options)(
                x, y, scale, bias, sample_weight=weight
            )
            for reduction in ("none", "sum", "mean")
        )
        torch.testing.assert_close(rows.sum(), total)
        torch.testing.assert_close(rows.sum() / weight.sum(), mean)
        with pytest.raises(ValueError, match="reduction"):
            cls(rank=rank, world_size=size, reduction="avg", **options)(x, y, scale)
        with pytest.raises(ValueError, match="rank, world_size: expected"):
            cls(rank=rank, world_size=size + 1)(x, y, scale)


def test_two_processes(tmp_path):
    run_ranks(__file__, SIZE, tmp_path)


def test_open_clips_constructors_and_calls():
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    clip = nn.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    out = clip(image_features=x, text_features=y, logit_scale=2.0, output_dict=True)
    logits = 2 * x @ y.T
    labels = torch.arange(4)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    assert list(out) == ["contrastive_loss"]
    torch.testing.assert_close(out["contrastive_loss"], expected)
    torch.testing.assert_close(clip(x, y, 2.0, torch.tensor(1.0), False), expected)
    with pytest.raises(ValueError, match="use_horovod"):
        nn.ClipLoss(use_horovod=True)
    siglip = nn.SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="gather")
    expected = -torch.nn.functional.logsigmoid((2 * torch.eye(4) - 1) * (logits - 3)).sum() / 4
    torch.testing.assert_close(siglip(x, y, 2.0, -3.0, True)["contrastive_loss"], expected)
    with pytest.raises(ValueError, match="dist_impl"):
        nn.SigLipLoss(dist_impl="broadcast")
    for cls in (nn.ClipLoss, nn.SigLipLoss):
        with pytest.raises(RuntimeError, match="init_process_group"):
            cls(rank=0, world_size=2)(x, y, 2.0)


if __name__ == "__main__":
    be_a_rank(work)
