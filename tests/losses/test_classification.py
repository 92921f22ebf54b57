"""cross_entropy as a drop-in for torch.nn.functional.cross_entropy, beyond what the registry lists."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.layouts import channels_last, expanded, lay, transposed

import fastloss
from fastloss.functional import cross_entropy

SHAPES = [(5,), (1,), (4, 7), (1, 1), (4, 1), (3, 6, 5), (2, 5, 3, 4), (2, 3, 1, 2, 2), (2, 1, 3)]


def draw(shape, seed=0, dtype=torch.float64, device="cpu"):
    """Logits, class indices and class probabilities."""
    g = torch.Generator().manual_seed(seed)
    dim = min(1, len(shape) - 1)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2
    q = torch.randn(shape, generator=g, dtype=torch.float64).softmax(dim)
    t = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :], generator=g)
    return x.to(device, dtype), t.to(device), q.to(device, dtype)


def both(x, target, *args, **kwargs):
    """(value, gradients) of fastloss and of torch, on the CPU: on CUDA it calls a mean of nothing 0, not NaN."""
    answers = []
    for function, device in ((cross_entropy, x.device), (F.cross_entropy, "cpu")):
        leaf = x.detach().to(device).requires_grad_()
        leaves = [leaf]
        if target.is_floating_point():
            leaves.append(target.detach().to(device).requires_grad_())
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        args = [v.to(device) if isinstance(v, torch.Tensor) else v for v in args]
        value = function(leaf, leaves[-1] if len(leaves) > 1 else target.to(device), *args, **options)
        up = torch.linspace(0.5, 1.5, value.numel(), device=device, dtype=value.dtype).view(value.shape)
        answers.append([value.detach(), *torch.autograd.grad(value, leaves, up)])
    return answers


def assert_parity(x, target, *args, **kwargs):
    ours, theirs = both(x, target, *args, **kwargs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True, check_device=False)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, weighted, smoothing, reduction, device):
    x, t, q = draw(shape, device=device)
    classes = shape[min(1, len(shape) - 1)]
    weight = torch.linspace(0.0, 2, classes, device=device, dtype=x.dtype) if weighted else None
    options = dict(weight=weight, reduction=reduction, label_smoothing=smoothing)
    assert_parity(x, q, **options)
    for ignored in (-100, 0, classes):
        assert_parity(x, t, ignore_index=ignored, **options)
    if t.ndim:
        some = t.clone()
        some.view(-1)[::2] = -1
        assert_parity(x, some, ignore_index=-1, **options)
        assert_parity(x, torch.full_like(t, -1), ignore_index=-1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_rows_ignored(dtype, device):
    """nan for the mean, 0 for the sum; the gradient is zero, as PyTorch's is for zero upstream rows."""
    x, t, _ = draw((4, 7), dtype=dtype, device=device)
    t = torch.full_like(t, -100)
    for reduction, value in (("mean", math.nan), ("sum", 0.0), ("none", 0.0)):
        leaf = x.clone().requires_grad_()
        out = cross_entropy(leaf, t, reduction=reduction)
        torch.testing.assert_close(out, torch.full_like(out, value), equal_nan=True)
        expected = x.clone().requires_grad_()
        F.cross_entropy(expected, t, reduction=reduction).sum().backward()
        out.sum().backward()
        torch.testing.assert_close(leaf.grad, expected.grad, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (3, 5, 0), (0, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty(shape, reduction, device):
    x, q = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    t = torch.zeros(shape[0], *shape[2:], dtype=torch.long, device=device)
    assert_parity(x, t, reduction=reduction)
    assert_parity(x, q, reduction=reduction)


def test_no_classes(real_device):
    if real_device == "cpu":  # on a GPU torch's own answer is a device-side assertion
        with pytest.raises(IndexError):
            cross_entropy(torch.zeros(3, 0), torch.zeros(3, dtype=torch.long))
    assert_parity(torch.zeros(3, 0, device=real_device), torch.zeros(3, 0, device=real_device))


def test_positional_arguments(device):
    x, t, _ = draw((4, 7), device=device)
    weight = torch.rand(7, device=device, dtype=x.dtype)
    assert_parity(x, t, weight, None, 2, None, "sum", 0.2)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments(size_average, reduce, device):
    """They override `reduction`, with torch's warning."""
    x, t, _ = draw((4, 7), device=device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cross_entropy(x, t, size_average=size_average, reduce=reduce)
    legacy = size_average is not None or reduce is not None
    assert any("deprecated" in str(w.message) for w in caught) == legacy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_parity(x, t, size_average=size_average, reduce=reduce)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_byte_targets(dtype, device):
    x, t, _ = draw((4, 7), dtype=dtype, device=device)
    assert torch.equal(cross_entropy(x, t.to(torch.uint8)), cross_entropy(x, t))


def test_single_row_with_batched_target(device):
    """torch takes a target of shape (1) for logits of shape (C), without a gradient at that."""
    x, t, _ = draw((7,), device=device)
    for reduction in ("none", "mean", "sum"):
        expected = F.cross_entropy(x, t.view(1), reduction=reduction)
        torch.testing.assert_close(cross_entropy(x, t.view(1), reduction=reduction), expected)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide_logits", [False, True])
def test_probabilities_of_another_type(narrow, wide_logits, device):
    """The result has the wider type, each gradient that of its tensor."""
    x, _, q = draw((4, 7), device=device)
    x, q = (x.double(), q.to(narrow)) if wide_logits else (x.to(narrow), q.double())
    ours, theirs = both(x, q)
    exact, _ = both(x.double(), q.double())  # torch rounds log-softmax to the narrow type
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, e.to(a.dtype))


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan, math.inf])
def test_label_smoothing_out_of_range(smoothing, device):
    x, t, q = draw((4, 7), device=device)
    for target in (t, q):
        with pytest.raises((RuntimeError, ValueError), match="label_smoothing"):
            cross_entropy(x, target, label_smoothing=smoothing)


def test_ignore_index_with_probabilities(device):
    x, _, q = draw((4, 7), device=device)
    with pytest.raises(RuntimeError, match="ignore_index"):
        cross_entropy(x, q, ignore_index=3)
    assert_parity(x, q, ignore_index=-1)


@pytest.mark.parametrize(
    "options",
    [{"ignore_index": 1.5}, {"ignore_index": "1"}, {"label_smoothing": "0.1"}, {"weight": [1.0] * 7}],
    ids=str,
)
def test_options_of_a_wrong_type(options, device):
    x, t, _ = draw((4, 7), device=device)
    with pytest.raises(TypeError, match=next(iter(options))):
        cross_entropy(x, t, **options)


@pytest.mark.parametrize(
    "option",
    [
        ("softcap", 0.0),
        ("softcap", -1.0),
        ("softcap", math.nan),
        ("logit_scale", math.nan),
        ("z_loss", math.nan),
    ],
    ids=str,
)
def test_extras_out_of_range(option, device):
    name, value = option
    x, t, _ = draw((4, 7), device=device)
    with pytest.raises((RuntimeError, ValueError), match=name):
        cross_entropy(x, t, **{name: value})


def test_weight_of_a_single_row(device):
    """Of the shape of the classes, as the weights of more rows are."""
    x, target, q = draw((5,), device=device)
    weight = torch.tensor(0.25, dtype=x.dtype, device=device)
    for y in (target, q):
        whole = cross_entropy(x, y)
        for reduction, factor in (("none", 0.25), ("sum", 0.25), ("mean", 1.0)):
            got = cross_entropy(x, y, reduction=reduction, sample_weight=weight)
            torch.testing.assert_close(got, factor * whole)
    with pytest.raises(ValueError, match=r"sample_weight: expected one number for each row, shape \(\)"):
        cross_entropy(x, target, sample_weight=torch.ones(5, dtype=x.dtype, device=device))


def test_class_out_of_bounds():
    """The same error, which begins with the class, from a call and from compiled code."""
    x, target = torch.randn(2, 3), torch.tensor([0, 3])
    for function in (cross_entropy, torch.compile(cross_entropy, backend="aot_eager")):
        with pytest.raises(IndexError, match=r"^Target 3 is out of bounds"):
            function(x, target)


def test_classes_in_the_last_dimension(device):
    """As language models have them: refused, with a hint."""
    x = torch.zeros(2, 4, 7, device=device)
    with pytest.raises(
        RuntimeError, match=r"classes are dimension 1 of the input, as after input.movedim\(-1, 1\)"
    ):
        cross_entropy(x, torch.zeros(2, 4, dtype=torch.int64, device=device))


def test_extras_are_keyword_only(device):
    x, t, _ = draw((4, 7), device=device)
    with pytest.raises(TypeError):
        cross_entropy(x, t, None, None, -100, None, "mean", 0.0, 1.0)


@pytest.mark.parametrize("layout", [channels_last, transposed, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 6, 5), (2, 64, 3), (4, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_has_the_inputs_layout(shape, layout, dtype, device):
    """Dense strides of the logits are kept in their gradient, as torch's autograd does for a leaf."""
    x, t, _ = draw(shape, dtype=dtype, device=device)
    leaf = lay(x, layout).requires_grad_()
    cross_entropy(leaf, t).backward()
    assert leaf.grad.stride() == torch.empty_like(leaf).stride()


# ---- extras ---------------------------------------------------------------------------------------------


def formula(x, t, reduction="mean", weight=None, eps=0.0, scale=1.0, cap=None, z=0.0, sample=None):
    """The definition, row by row, written down a second time."""
    x = x * scale
    x = cap * torch.tanh(x / cap) if cap else x
    n, classes = x.shape
    weight = torch.ones(classes, dtype=x.dtype) if weight is None else weight
    sample = torch.ones(n, dtype=x.dtype) if sample is None else sample
    rows, total = [], x.new_zeros(())
    for i in range(n):
        if t[i] == -100:
            rows.append(x[i].sum() * 0)
            continue
        lse, w = x[i].logsumexp(0), weight[t[i]]
        loss = w * ((1 - eps) * (lse - x[i, t[i]]) + z * lse**2)
        rows.append(sample[i] * (loss + eps / classes * (weight * (lse - x[i])).sum()))
        total = total + w * sample[i]
    rows = torch.stack(rows)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / total}[reduction]


EXTRAS = {
    "eps": (0.0, 1.0),
    "scale": (1.0, 0.3),
    "cap": (None, 3.0),
    "z": (0.0, 0.05),
    "sample": (None, torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)),
    "weight": (None, torch.linspace(0.2, 2, 6, dtype=torch.float64)),
}
NAMES = {
    "eps": "label_smoothing",
    "scale": "logit_scale",
    "cap": "softcap",
    "z": "z_loss",
    "sample": "sample_weight",
    "weight": "weight",
}


def extras():
    """Every combination, under the names of `formula` and under those of `cross_entropy`."""
    for values in itertools.product(*EXTRAS.values()):
        plain = dict(zip(EXTRAS, values, strict=True))
        yield plain, {NAMES[k]: v for k, v in plain.items()}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_extras_in_all_combinations(reduction, device):
    x, t, _ = draw((5, 6))
    t[1] = -100
    for plain, named in extras():
        a, b = x.clone().requires_grad_(), x.clone().to(device).requires_grad_()
        expected = formula(a, t, reduction, **plain)
        named = {k: v.to(device) if torch.is_tensor(v) else v for k, v in named.items()}
        got = cross_entropy(b, t.to(device), reduction=reduction, **named)
        torch.testing.assert_close(got.cpu(), expected)
        up = torch.linspace(0.5, 2, expected.numel(), dtype=x.dtype).view(expected.shape)
        expected.backward(up)
        got.backward(up.to(device))
        torch.testing.assert_close(b.grad.cpu(), a.grad)


def test_neutral_extras_change_no_bit(device):
    x, t, _ = draw((6, 50), dtype=torch.float32, device=device)
    plain = cross_entropy(x, t, reduction="none")
    ones = torch.ones(6, device=device)
    for options in ({"logit_scale": 1.0}, {"softcap": None}, {"z_loss": 0.0}, {"sample_weight": ones}):
        assert torch.equal(cross_entropy(x, t, reduction="none", **options), plain), options


def test_reference_is_the_formula():
    x, t, _ = draw((5, 6))
    for plain, named in extras():
        torch.testing.assert_close(fastloss.reference.cross_entropy(x, t, **named), formula(x, t, **plain))


def test_in_training(device):
    """Two models from one seed, one trained with each loss, stay together."""
    finals = []
    for function in (cross_entropy, F.cross_entropy):
        torch.manual_seed(0)
        layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 11)
        model = torch.nn.Sequential(*layers).to(device)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        x = torch.randn(64, 8).to(device)
        t = torch.randint(11, (64,)).to(device)
        for _ in range(20):
            optimiser.zero_grad()
            value = function(model(x), t, label_smoothing=0.05)
            value.backward()
            optimiser.step()
        finals.append(value.detach())
    torch.testing.assert_close(*finals)


@pytest.mark.parametrize("rows", [4096, 4097, 100_000])
def test_sums_over_rows(rows, device):
    """On CUDA one block adds up to 4096 rows, and several blocks add more: the norm, and the losses."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0)).to(device)
    target = torch.arange(rows, device=device) % 2
    target[::3] = -100
    weight = torch.tensor([0.5, 2.0], device=device)
    want = F.cross_entropy(x.double().cpu(), target.cpu(), weight.double().cpu())
    loss = cross_entropy(x, target, weight).double().cpu()
    torch.testing.assert_close(loss, want, rtol=3e-7, atol=0.0)
    total = cross_entropy(x, target, weight, reduction="sum").double().cpu()
    want = F.cross_entropy(x.double().cpu(), target.cpu(), weight.double().cpu(), reduction="sum")
    torch.testing.assert_close(total, want, rtol=3e-7, atol=0.0)
