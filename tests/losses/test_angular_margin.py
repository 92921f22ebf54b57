"""Angular margins and harmonic loss: guards, sub-centres, sampled classes, poles, what the sources say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import same_bits

from fastloss._ops import chunked_linear, logit_transforms
from fastloss.functional import arcface_loss, cosface_loss, harmonic_loss


def problem(device="cpu", rows=9, features=6, classes=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, features, generator=g, dtype=torch.float64) for n in (rows, classes))
    target = torch.randint(classes, (rows,), generator=g)
    return x.to(device).requires_grad_(), w.to(device).requires_grad_(), target.to(device)


def at_angle(degrees):
    """One embedding that far from its class's centre."""
    t = math.radians(degrees)
    x = torch.tensor([[math.cos(t), math.sin(t), 0.0]], dtype=torch.float64, requires_grad=True)
    w = torch.eye(3, dtype=torch.float64)[[0, 2]]
    return x, w, torch.tensor([0])


@pytest.mark.parametrize("degrees", [0.0, 20.0, 80.0, 100.0, 150.0, 175.0, 180.0])
@pytest.mark.parametrize("easy", [False, True], ids=["guard", "easy"])
def test_margin_of_the_angle(degrees, easy):
    """cos(theta + m), beyond it what keeps the logit falling; finite at the poles."""
    m, s = 0.5, 4.0
    x, w, y = at_angle(degrees)
    t = math.radians(degrees)
    if easy:
        phi = math.cos(t + m) if math.cos(t) > 0 else math.cos(t)
    else:
        phi = math.cos(t + m) if t + m < math.pi else math.cos(t) - m * math.sin(m)
    loss = arcface_loss(x, w, y, s, m, easy_margin=easy)
    expected = F.cross_entropy(torch.tensor([[s * phi, 0.0]], dtype=torch.float64), y)
    torch.testing.assert_close(loss, expected, rtol=0, atol=s * 4e-4 if degrees in (0, 180) else 1e-9)
    loss.backward()
    assert x.grad.isfinite().all()


def test_straight_through_is_the_cosines_gradient(device):
    """Same value; the gradient as if the margin were a constant."""
    x, w, y = problem(device)
    exact, straight = (arcface_loss(x, w, y, margin_grad=kind) for kind in ("exact", "straight_through"))
    assert same_bits(exact, straight)
    c = F.normalize(x) @ F.normalize(w).t()
    own = c.gather(1, y[:, None])
    turned = torch.where(own > -math.cos(0.5), (own.acos() + 0.5).cos(), own - 0.5 * math.sin(0.5))
    plain = F.cross_entropy(64 * c.scatter(1, y[:, None], own + (turned - own).detach()), y)
    torch.testing.assert_close(
        torch.autograd.grad(straight, (x, w)), torch.autograd.grad(plain, (x, w)), rtol=1e-6, atol=1e-8
    )
    assert not torch.allclose(*(torch.autograd.grad(v, x)[0] for v in (arcface_loss(x, w, y, 4.0),
        arcface_loss(x, w, y, 4.0, margin_grad="straight_through"))))  # fmt: skip


@pytest.mark.parametrize("loss", [arcface_loss, cosface_loss])
def test_sampled_classes_are_a_smaller_problem(loss, device):
    x, w, y = problem(device)
    listed = torch.cat([y.unique(), torch.tensor([i for i in range(20) if i not in y][:3]).to(device)])
    place = torch.tensor([listed.tolist().index(c) for c in y.tolist()]).to(device)
    few = w[listed].detach().requires_grad_()
    a, b = loss(x, w, y, 8.0, classes=listed), loss(x, few, place, 8.0)
    torch.testing.assert_close(a, b)
    ga, gb = torch.autograd.grad(a, w)[0], torch.autograd.grad(b, few)[0]
    torch.testing.assert_close(ga[listed], gb)
    rest = torch.ones(20, dtype=torch.bool)
    rest[listed.cpu()] = False
    assert ga[rest.to(device)].eq(0).all()


def test_a_target_that_is_not_listed():
    x, w, y = problem()
    with pytest.raises(IndexError, match=r"target: .*`classes`"):
        arcface_loss(x, w, y, classes=torch.tensor([int(y[0])]))


def test_one_centre_is_no_sub_centre(device):
    x, w, y = problem(device)
    assert same_bits(arcface_loss(x, w, y), arcface_loss(x, w.unsqueeze(1), y))


def test_harmonic_does_not_change_with_scale(device):
    x, w, y = problem(device)
    torch.testing.assert_close(
        harmonic_loss(x, w, y, eps=1e-30), harmonic_loss(100 * x, 100 * w, y, eps=1e-30)
    )
    d = torch.cdist(x, w)
    p = d.pow(-math.sqrt(6)) / d.pow(-math.sqrt(6)).sum(1, keepdim=True)
    torch.testing.assert_close(harmonic_loss(x, w, y), -p.gather(1, y[:, None]).log().mean())


@pytest.mark.parametrize("loss", [arcface_loss, harmonic_loss])
def test_chunks_change_no_row(loss, monkeypatch):
    x, w, y = problem(rows=30)
    answers = []
    for size in (1, 7, 100):
        monkeypatch.setattr(chunked_linear, "rows_of_a_chunk", lambda *_, size=size: size)
        value = loss(x, w, y, reduction="none")
        answers.append((value, torch.autograd.grad(value.sum(), x)[0]))
    for answer in answers[1:]:
        assert all(same_bits(a, e) for a, e in zip(answer, answers[0], strict=True))


def test_a_chunk_has_room_for_what_stands_beside_it(monkeypatch):
    """Elements that a transform allocates beyond its products count."""
    seen = []
    monkeypatch.setattr(chunked_linear, "rows_of_a_chunk", lambda width, *_: seen.append(width) or 4)
    x, w, y = problem()
    arcface_loss(x, w.unsqueeze(1).expand(-1, 3, -1), y)
    harmonic_loss(x, w, y)
    assert seen == [20 * 3 + 3 * 20, 2 * 20]
    assert (
        logit_transforms.AngularMargin(
            6, additive=0.0, margin=0.5, easy=0.0, straight=0.0, centres=1.0
        ).extra_per_row(20)
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"m": -0.1}, "m"), ({"s": 0.0}, "s"), ({"margin_grad": "none"}, "margin_grad")],
    ids=["m", "s", "margin_grad"],
)
def test_bad_options(arguments, error):
    x, w, y = problem()
    with pytest.raises(ValueError, match=error):
        arcface_loss(x, w, y, **arguments)
