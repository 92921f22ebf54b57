"""Contrastive losses over two and three processes: values and gradients of one process."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support import same_bits
from support.distributed_cases import (
    CASES,
    FEATURES,
    IMAGES,
    ROWS,
    WEIGHT,
    arguments,
    drawn,
    of_this_rank,
    part,
)
from support.ranks import be_a_rank, run_ranks
from torch import nn

import fastloss
import fastloss.distributed
from fastloss import functional, reference
from fastloss.distributed.call import Call

# the gradients of the loss, as those of one process
distributed = SimpleNamespace(
    **{n: partial(getattr(fastloss.distributed, n), for_ddp=False) for n, _ in CASES.values()}
)

CUTS = {2: (0, 8, ROWS), 3: (0, 5, 5, ROWS)}  # unequal, and a rank without rows
SHARE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2}
EXCHANGES = ("gather", "ring")


def of_rows(loss, rows):
    """The places of this rank's rows among the losses of one process, where there may be two of each."""
    own = torch.arange(ROWS)[rows]
    return torch.cat([own + at for at in range(0, loss.numel(), ROWS)])


def close(got, expected, dtype, what, share=None):
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    if got.numel():
        error = (got.double() - expected.double()).abs().max()
        assert error <= (share or SHARE[dtype]) * max(expected.double().abs().max(), 1), f"{what}: {error}"


def everywhere(x):
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.detach())
    return found


def check_case(rank, size, case, dtype, reduction, **options):
    rows = slice(*CUTS[size][rank : rank + 2])
    name, whole = arguments(case, dtype)
    mine = of_this_rank(whole, rows)
    theirs = getattr(functional, name)(**whole, reduction=reduction)
    ours = getattr(distributed, name)(**mine, reduction=reduction, **options)
    upstream = torch.linspace(0.5, 1.5, theirs.numel(), dtype=dtype).view(theirs.shape)
    theirs.backward(upstream)
    what = f"{case} {dtype} {reduction} {options} on rank {rank} of {size}:"
    if reduction == "none":
        places = of_rows(theirs, rows)
        close(ours, theirs[places], dtype, f"{what} value")
        ours.backward(upstream[places])
    else:
        close(ours, theirs, dtype, f"{what} value")
        ours.backward(upstream)
        assert all(same_bits(t, ours) for t in everywhere(ours)), f"{what} differs between ranks"
    if name == "siglip_loss" and options["exchange"] == "gather":
        expected = theirs[places] if reduction == "none" else theirs
        assert same_bits(ours.detach(), expected.detach()), f"{what} bits"
    for key, value in whole.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            # the gradient of what changes nothing may be none
            expected = torch.zeros_like(value) if value.grad is None else value.grad
            close(mine[key].grad, part(key, expected, rows), dtype, f"{what} gradient of {key}")


def check_one_rank(case, dtype, reduction, alone, exchange):
    """To the bit."""
    name, whole = arguments(case, dtype)
    mine = of_this_rank(whole, slice(None))
    theirs = getattr(functional, name)(**whole, reduction=reduction)
    loss = getattr(fastloss.distributed, name)  # of one rank nothing has to be said of DDP
    ours = loss(**mine, reduction=reduction, group=alone, exchange=exchange)
    assert same_bits(ours, theirs), f"{case} {dtype} {reduction}"
    for loss in (ours, theirs):
        loss.backward(torch.linspace(0.5, 1.5, loss.numel(), dtype=dtype).view(loss.shape))
    for key, value in mine.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            assert same_bits(value.grad, whole[key].grad), f"{case} {dtype}: gradient of {key}"


def check_weight_of_siglip(rank, size):
    x, y = IMAGES.values()
    rows = slice(*CUTS[size][rank : rank + 2])
    for reduction in ("mean", "sum"):
        whole, mine = WEIGHT.clone().requires_grad_(), WEIGHT[rows].clone().requires_grad_()
        theirs = reference.siglip_loss(x, y, 2.0, reduction=reduction, sample_weight=whole)
        ours = distributed.siglip_loss(x[rows], y[rows], 2.0, reduction=reduction, sample_weight=mine)
        theirs.backward()
        ours.backward()
        close(ours, theirs, torch.float64, "value")
        close(mine.grad, whole.grad[rows], torch.float64, "gradient of the weight")


def check_bound(rank, size):
    """A pair's loss in float32 differs from that of one process by what the docstring says."""
    x, y = (nn.functional.normalize(drawn(ROWS, FEATURES, seed=s)).float() for s in (1, 2))
    rows = slice(*CUTS[size][rank : rank + 2])
    bound = 2**-24 * (2 * ROWS + 8 * 20 + 16)
    for name, exchange in itertools.product(("clip_loss", "siglip_loss"), EXCHANGES):
        theirs = getattr(functional, name)(x, y, 20.0, reduction="none")[rows]
        ours = getattr(distributed, name)(x[rows], y[rows], 20.0, reduction="none", exchange=exchange)
        assert ((ours - theirs).abs() <= bound * theirs).all(), name


def check_cold(rank, size):
    """At temperature 0.005 exponents span 400: finite, and as of one process."""
    rows = slice(*CUTS[size][rank : rank + 2])
    x, y = (nn.functional.normalize(drawn(ROWS, FEATURES, seed=s)).float() for s in (1, 2))
    calls = {
        "clip_loss": (200.0,), "siglip_loss": (200.0,), "info_nce": (None, 0.005), "nt_xent_loss": (0.005,),
        "multiple_negatives_ranking_loss": (None, 200.0),
    }  # fmt: skip
    for (name, rest), exchange in itertools.product(calls.items(), EXCHANGES):
        whole = [t.clone().requires_grad_() for t in (x, y)]
        mine = [t[rows].clone().requires_grad_() for t in (x, y)]
        theirs = getattr(functional, name)(*whole, *rest)
        ours = getattr(distributed, name)(*mine, *rest, exchange=exchange)
        theirs.backward()
        ours.backward()
        assert ours.isfinite()
        close(ours, theirs, torch.float32, name)
        for t, full in zip(mine, whole, strict=True):
            close(t.grad, full.grad[rows], torch.float32, name, share=1e-4)


def check_far_below_zero(rank, size):
    """Similarities near -200, and ranks that have nothing but the positive to add: sums keep their digits."""
    rows = slice(rank, rank + 1 if rank + 1 < size else ROWS)
    e = nn.functional.normalize(torch.ones(1, FEATURES, dtype=torch.float64))
    x, y = ((sign * e + 0.002 * drawn(ROWS, FEATURES, seed=s)).float() for s, sign in ((1, 1), (2, -1)))
    for (name, options), exchange in itertools.product(
        (("clip_loss", {"logit_scale": 200.0}), ("info_nce", {"temperature": 0.005, "normalize": False})),
        EXCHANGES,
    ):
        theirs = getattr(functional, name)(x, y, **options, reduction="none")[rows]
        ours = getattr(distributed, name)(x[rows], y[rows], **options, reduction="none", exchange=exchange)
        close(ours, theirs, torch.float32, f"{name} {exchange}", share=1e-6)


def check_tiles(rank, size):
    """Rows and columns of several tiles."""
    x, y, labels = drawn(450, 8), drawn(450, 8, seed=1), torch.arange(450) % 97
    for name, other in (("clip_loss", (y, 3.0)), ("siglip_loss", (y, 3.0)), ("sup_con_loss", (labels,))):
        rows = slice(230 * rank, 230 * rank + 230)
        whole = [x.clone().requires_grad_(), *other]
        theirs = getattr(functional, name)(*whole)
        theirs.backward()
        for exchange in EXCHANGES:
            mine = x[rows].clone().requires_grad_()
            second = [t[rows] if isinstance(t, torch.Tensor) else t for t in other]
            ours = getattr(distributed, name)(mine, *second, exchange=exchange)
            ours.backward()
            close(ours, theirs, torch.float64, name)
            close(mine.grad, whole[0].grad[rows], torch.float64, name, share=1e-15)


def check_classes(rank, size):
    """Classes that are together on several ranks alone; and none that has two rows."""
    for labels in (torch.arange(2 * size) % size, torch.arange(2 * size)):
        x = drawn(2 * size, 4).requires_grad_()
        mine = x[2 * rank : 2 * rank + 2].detach().clone().requires_grad_()
        theirs = functional.sup_con_loss(x, labels)
        theirs.backward()
        for exchange in EXCHANGES:
            mine.grad = None
            own = labels[2 * rank : 2 * rank + 2]
            ours = distributed.sup_con_loss(mine, own, exchange=exchange)
            ours.backward()
            close(ours, theirs, torch.float64, "value")
            close(mine.grad, x.grad[2 * rank : 2 * rank + 2], torch.float64, "gradient")
    assert ours == 0 and not mine.grad.any()


def check_keys_of_no_query(rank, size):
    """More keys than queries, which begin somewhere else on every rank; and fewer rows of negatives here than there."""
    q, k, n = drawn(2 * size, 4), drawn(5 * size, 4, seed=1), drawn(size * (size + 1) // 2, 4, seed=2)
    mine, keys = q[2 * rank : 2 * rank + 2], k[5 * rank : 5 * rank + 5]
    own = torch.tensor([5 * r + 1 + i for r in range(size) for i in range(2)])
    first = torch.cat(
        [k[own], k[[j for j in range(5 * size) if j not in own]]]
    )  # the same keys, the positives first
    begin = rank * (rank + 1) // 2
    for exchange in EXCHANGES:
        ours = distributed.info_nce(mine, keys, label_offset=1, exchange=exchange)
        close(ours, functional.info_nce(q, first), torch.float64, "info_nce")
        ours = distributed.siglip_loss(mine, keys, 2.0, label_offset=1, exchange=exchange)
        close(ours, functional.siglip_loss(q, first, 2.0), torch.float64, "siglip_loss")
        negatives = n[begin : begin + rank + 1]
        ours = distributed.info_nce(mine, keys[1:3], negatives, exchange=exchange)
        close(ours, functional.info_nce(q, k[own], n), torch.float64, "negative keys")


def check_autocast(rank, size):
    rows = slice(*CUTS[size][rank : rank + 2])
    for case in ("clip", "siglip", "info_nce", "sup_con", "nt_xent", "ranking, hard negatives"):
        name, whole = arguments(case, torch.float32)
        mine = of_this_rank(whole, rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = getattr(functional, name)(**whole)
            ours = getattr(distributed, name)(**mine)
        assert ours.dtype == torch.float32
        close(ours, theirs, torch.float32, case)
        theirs.backward()
        ours.backward()
        first = next(iter(mine))
        close(mine[first].grad, whole[first].grad[rows], torch.bfloat16, case)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(5, 4), nn.Linear(7, 4)
        self.scale, self.bias = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor([-1.0]))

    def forward(self, image, text):
        return self.image(image), self.text(text), self.scale, self.bias


def check_ddp(rank, size):
    """Training of DistributedDataParallel on parts of the batch is that of one process on all of it."""
    image, text = drawn(ROWS, 5), drawn(ROWS, 7)
    rows = slice(*CUTS[2][rank : rank + 2])
    for name, exchange in itertools.product(("clip_loss", "siglip_loss"), EXCHANGES):
        torch.manual_seed(0)
        alone = Towers().double()
        torch.manual_seed(0)
        together = nn.parallel.DistributedDataParallel(Towers().double())
        for model, theirs in ((alone, True), (together, False)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                if theirs:
                    loss = getattr(functional, name)(*model(image, text), normalize=True)
                else:
                    features = model(image[rows], text[rows])
                    loss = getattr(distributed, name)(
                        *features, normalize=True, for_ddp=True, exchange=exchange
                    )
                loss.backward()
                optimizer.step()
        parameters = zip(alone.named_parameters(), together.module.parameters(), strict=True)
        for (what, expected), got in parameters:
            close(got, expected, torch.float64, f"{name} {what}")
            close(got.grad, expected.grad, torch.float64, f"{name}: gradient of {what}")


def check_counts(rank, size):
    """Elsewhere than on the CPU ranks have as many rows as this one, or what they are told to have."""
    x = torch.empty(4 + rank, 6, device="meta")
    for given, rows in ((None, (4 + rank,) * 2), ([4, 5], (4, 5))):
        call = Call("clip_loss", x, None, "gather", False, given, "mean", x.shape[0] + 2)
        assert call.rows.counts == rows and call.columns.counts == tuple(n + 2 for n in rows)


def check_errors(rank, size):
    x, y = drawn(4, 6 + rank), drawn(4, 6 + rank)
    with pytest.raises(ValueError, match=r"image_features\.shape\[1\].*\[6, 7\]"):
        distributed.clip_loss(x, y, 1.0)
    x, y = drawn(4, 6).requires_grad_(), drawn(4, 6)
    with pytest.raises(ValueError, match="reduction"):
        distributed.siglip_loss(x, y, 1.0, reduction=("mean", "sum")[rank])
    with pytest.raises(ValueError, match="exchange"):
        distributed.info_nce(x, y, exchange=EXCHANGES[rank])
    with pytest.raises(ValueError, match="sample_weight"):
        distributed.info_nce(x, y, sample_weight=torch.ones(4, dtype=torch.float64) if rank else None)
    with pytest.raises(ValueError, match="requires_grad"):
        distributed.info_nce(x.detach().requires_grad_(rank == 0), y)
    with pytest.raises(RuntimeError, match="another loss"):
        (distributed.info_nce, distributed.nt_xent_loss)[rank](x, y)
    with pytest.raises(ValueError, match="exchange: expected 'gather' or 'ring'"):
        distributed.nt_xent_loss(x, y, exchange="broadcast")
    for wrong in ([4], [5, 5]):
        with pytest.raises(ValueError, match="rows_per_rank"):
            distributed.clip_loss(x, y, 1.0, rows_per_rank=wrong)
    with pytest.raises(ValueError, match="rows_per_rank"):
        distributed.clip_loss(x, y, 1.0, rows_per_rank=[4, 5] if rank == 0 else [5, 4])
    with pytest.raises(ValueError, match="text_features"):
        distributed.clip_loss(x, y[:3], 1.0)
    for loss in (distributed.clip_loss(x, y, 1.0), distributed.siglip_loss(x, y, 1.0)):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(loss, x, create_graph=True)
    a, b = torch.autograd.grad(loss, x, retain_graph=True), torch.autograd.grad(loss, x)
    assert same_bits(a[0], b[0])
    assert distributed.clip_loss(x, y, 1.0, rows_per_rank=[4, 4]) == distributed.clip_loss(x, y, 1.0)


def check_profile(rank, size):
    """A profile sees the calls, by the names of the public functions, and changes nothing."""
    x, y = drawn(4, 6, seed=rank).requires_grad_(), drawn(4, 6, seed=size + rank)
    for exchange in EXCHANGES:
        calls = (
            partial(distributed.clip_loss, x, y, 2.0, exchange=exchange),
            partial(distributed.siglip_loss, x, y, 2.0, exchange=exchange),
            partial(distributed.nt_xent_loss, x, y, exchange=exchange),
        )
        expected = [torch.autograd.grad(call(), x)[0] for call in calls]
        with fastloss.profile() as p:
            got = [torch.autograd.grad(call(), x)[0] for call in calls]
            distributed.clip_loss(x.detach(), y, 2.0, exchange=exchange)
        assert all(same_bits(g, e) for g, e in zip(got, expected, strict=True))
        clip, siglip, nt_xent, alone = p.calls
        assert [c.loss for c in p.calls] == ["clip_loss", "siglip_loss", "nt_xent_loss", "clip_loss"]
        assert [c.operator for c in (clip, siglip)] == ["contrastive_softmax", "contrastive_sigmoid"]
        assert clip.shape == siglip.shape == (4, 6) and nt_xent.shape == (8, 6)
        for call in (clip, siglip, nt_xent):
            (backward,) = call.backward
            for one in (call.forward, backward):
                assert one.ms > 0 and one.bytes > 0
        assert clip.forward.bytes >= 2 * x.nbytes and clip.backward[0].bytes >= 3 * x.nbytes
        assert alone.backward == []


def check_group(rank, size):
    """Ranks with other numbers in their group; a third process takes no part."""
    pair = dist.new_group([1, 2])
    if rank == 0:
        with pytest.raises(RuntimeError, match="not one of its ranks"):
            distributed.clip_loss(drawn(4, 6), drawn(4, 6), 1.0, group=pair)
        return
    x, y = drawn(8, 6), drawn(8, 6, seed=1)
    rows = slice(4 * rank - 4, 4 * rank)
    for exchange in EXCHANGES:
        ours = distributed.clip_loss(x[rows], y[rows], 1.0, group=pair, exchange=exchange)
        close(ours, functional.clip_loss(x, y, 1.0), torch.float64, "value")


def check_empty(rank, size):
    x = torch.zeros(0, 6, requires_grad=True)
    loss = distributed.clip_loss(x, x, 1.0, reduction="sum")
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 6)


def work(rank: int, size: int) -> None:
    checks = (
        check_weight_of_siglip,
        check_bound,
        check_far_below_zero,
        check_cold,
        check_classes,
        check_keys_of_no_query,
        check_empty,
    )
    for case, exchange in itertools.product(CASES, EXCHANGES):
        check_case(rank, size, case, torch.float64, "mean", exchange=exchange)
        if size == 2:
            check_case(rank, size, case, torch.float64, "none", exchange=exchange)
            check_case(rank, size, case, torch.float32, "sum", exchange=exchange)
            check_case(rank, size, case, torch.bfloat16, "mean", exchange=exchange)
    if size == 2:
        alone = [dist.new_group([r]) for r in range(size)][rank]
        for case, dtype, reduction in itertools.product(CASES, SHARE, ("none", "mean")):
            check_one_rank(case, dtype, reduction, alone, "ring" if reduction == "none" else "gather")
        checks = *checks, check_tiles, check_counts, check_profile, check_autocast, check_ddp, check_errors
    else:
        checks = *checks, check_group
    for check in checks:
        check(rank, size)


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.slow
def test_processes(size, tmp_path):
    run_ranks(__file__, size, tmp_path)


def test_without_a_process_group():
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="init_process_group"):
        fastloss.distributed.clip_loss(x, x, 1.0)


if __name__ == "__main__":
    be_a_rank(work)
