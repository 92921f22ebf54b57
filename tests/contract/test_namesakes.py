"""Modules against their namesakes in `torch.nn`: signature, attributes, state, values."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from fastloss import nn


def parameters(function):
    return {n: p for n, p in inspect.signature(function).parameters.items() if n != "self"}


NAMESAKES = [n for n in dir(torch.nn) if n.endswith("Loss")]
NOT_YET = {
    "AdaptiveLogSoftmaxWithLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "MarginRankingLoss",
    "MultiLabelMarginLoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "PoissonNLLLoss",
    "SoftMarginLoss",
    "TripletMarginWithDistanceLoss",
}
N, C = 6, 5
every_namesake = pytest.mark.parametrize("name", sorted(set(NAMESAKES) - NOT_YET))


def draw(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def inputs_of(name, out_features=()):
    rows = draw(N, C)
    classes = torch.arange(N) % C
    lengths = torch.full((2,), N)
    triple = rows, rows.flip(0), rows.roll(2, 0)
    return {
        "BCELoss": (rows, draw(N, C).round()),
        "CTCLoss": (draw(N, 2, C).log_softmax(2), torch.tensor([[1, 3], [3, 1]]), lengths, lengths - 4),
        "CosineEmbeddingLoss": (rows, rows.flip(0), torch.tensor([1, -1] * 3)),
        "CrossEntropyLoss": (10 * rows, classes),
        "KLDivLoss": (rows.log_softmax(1), draw(N, C).softmax(1)),
        "LinearCrossEntropyLoss": (
            rows, classes.reshape(N, *[1] * len(out_features)).expand(N, *out_features),
        ),
        "TripletMarginLoss": triple,
    }.get(name, (4 * rows, draw(N, C).round()))  # fmt: skip


def values_of(name, option):
    """Other values of an option than its default."""
    weights = [draw(C) + 0.5] + [torch.tensor([5.0], dtype=torch.float64), draw(N, C)] * ("BCE" in name)
    return {
        "beta": [0.3],
        "bias": [True],
        "blank": [2],
        "delta": [0.3],
        "device": ["cpu"],
        "dtype": [torch.float64],
        "eps": [0.1],
        "ignore_index": [2],
        "label_smoothing": [0.1],
        "log_target": [True],
        "margin": [0.3],
        "options": ["LinearCrossEntropyOptions"],
        "out_features": [(2,)],
        "p": [1.0],
        "pos_weight": weights,
        "reduce": [False, True],
        "reduction": ["none", "sum"] + ["batchmean"] * (name == "KLDivLoss"),
        "size_average": [False, True],
        "swap": [True],
        "weight": weights,
        "zero_infinity": [True],
    }[option]


def pair(name, **options):
    """The class here and that of torch with the same options and, if any, weights."""
    if name == "LinearCrossEntropyLoss":
        options = {"in_features": C, "num_classes": C, "dtype": torch.float64} | options
        if "options" in options:
            options["options"] = torch.nn.LinearCrossEntropyOptions()
    ours, theirs = getattr(nn, name)(**options), getattr(torch.nn, name)(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_every_namesake_is_here_or_known_to_be_missing():
    assert set(NAMESAKES) - set(nn.__all__) == NOT_YET & set(NAMESAKES)
    assert not NOT_YET & set(nn.__all__)


@every_namesake
def test_namesakes_signature(name):
    for method in ("__init__", "forward"):
        ours, theirs = (list(parameters(getattr(getattr(m, name), method)).values()) for m in (nn, torch.nn))
        same, more = ours[: len(theirs)], ours[len(theirs) :]
        assert [(p.name, p.kind, p.default) for p in same] == [(p.name, p.kind, p.default) for p in theirs]
        assert all(p.kind is p.KEYWORD_ONLY for p in more) and not any(p.default is p.empty for p in more)


def cases_of_namesakes():
    found = []
    for name in sorted(set(NAMESAKES) - NOT_YET):
        found.append(pytest.param(name, {}, id=name))
        for option in parameters(getattr(torch.nn, name).__init__):
            if option not in ("in_features", "num_classes"):
                values = values_of(name, option)
                found += [
                    pytest.param(name, {option: v}, id=f"{name}-{option}{i}") for i, v in enumerate(values)
                ]
    return found


@pytest.mark.filterwarnings("ignore:size_average", "ignore:reduction", "ignore:.*batchmean")
@pytest.mark.parametrize(("name", "options"), cases_of_namesakes())
def test_namesakes_value_state_and_attributes(name, options):
    ours, theirs = pair(name, **options)
    assert isinstance(ours, type(theirs)) and type(ours) is not type(theirs)
    args = inputs_of(name, options.get("out_features", ()))
    if options.get("log_target"):
        args = args[0], args[1].log()
    torch.testing.assert_close(ours(*args), theirs(*args), rtol=1e-10, atol=1e-12)
    assert getattr(ours, "__constants__", None) == getattr(theirs, "__constants__", None)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    public, expected = (
        {k: v for k, v in vars(m).items() if not k.startswith("_") or k in ("_buffers", "_parameters")}
        for m in (ours, theirs)
    )
    for registered in ("_buffers", "_parameters"):
        mine, other = public.pop(registered), expected.pop(registered)
        assert list(mine) == list(other)
        assert all(torch.equal(mine[k], other[k]) for k in mine if other[k] is not None)
    assert {k: public[k] for k in expected} == expected
    assert public.keys() - expected.keys() <= parameters(type(ours).__init__).keys()


@every_namesake
def test_namesakes_constructor_takes_positions(name):
    """All options by position, where the constructor takes them so."""
    taken = [p for p in parameters(getattr(torch.nn, name).__init__).values() if p.kind is not p.KEYWORD_ONLY]
    if name == "LinearCrossEntropyLoss":
        values = [C, C]
    else:
        values = [
            p.default if p.name in ("size_average", "reduce") else values_of(name, p.name)[0] for p in taken
        ]
    ours, theirs = getattr(nn, name)(*values), getattr(torch.nn, name)(*values)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for p in taken:
        mine, other = (getattr(m, p.name, None) for m in (ours, theirs))
        assert mine is other or mine == other


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TripletMarginLoss", {"margin": -1.0}),
        ("LinearCrossEntropyLoss", {"in_features": 4, "num_classes": 5, "weight": torch.ones(4)}),
        ("LinearCrossEntropyLoss", {"in_features": 4, "num_classes": 5, "label_smoothing": 2.0}),
    ],
)
def test_namesakes_constructor_checks(name, options):
    if hasattr(torch.nn, name):
        with pytest.raises(Exception) as theirs:
            getattr(torch.nn, name)(**options)
        with pytest.raises(theirs.type):
            getattr(nn, name)(**options)


def test_output_layer_of_a_model_may_be_shared():
    head = torch.nn.Linear(4, 7, bias=False)
    module = nn.LinearCrossEntropyLoss(4, 7)
    module.linear = head
    x, y = torch.randn(3, 4), torch.tensor([0, 6, 2])
    module(x, y).backward()
    expected = torch.nn.functional.cross_entropy(head(x), y)
    torch.testing.assert_close(module(x, y), expected)
    torch.testing.assert_close(head.weight.grad, torch.autograd.grad(expected, head.weight)[0])


def test_a_torch_without_linear_cross_entropy():
    code = """
import torch
for where, name in ((torch.nn, "LinearCrossEntropyLoss"), (torch.nn, "LinearCrossEntropyOptions"),
                    (torch.nn.functional, "linear_cross_entropy")):
    if hasattr(where, name):
        delattr(where, name)
import fastloss
loss = fastloss.nn.LinearCrossEntropyLoss(4, 5, bias=True)
loss(torch.randn(3, 4), torch.arange(3)).backward()
assert loss.linear.weight.grad.abs().sum() > 0 and list(loss.state_dict()) == ["linear.weight", "linear.bias"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
