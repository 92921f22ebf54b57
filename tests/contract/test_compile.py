"""torch.compile, torch.export, fake tensors, autocast, and the raw operators beneath them."""

from __future__ import annotations

import functools

import pytest
import torch
from support import (
    assert_same_bits,
    differentiable,
    every_loss,
    fullest_case,
    fused,
    is_float,
    make,
    of_tensors,
    requiring,
    small_shape,
    some_cases,
    some_cases_in_one_dtype,
    some_dtypes,
    tensors,
)
from support.layouts import channels_last, expanded, lay, strided, transposed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def constants(kwargs):
    return {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}


def compiled(loss, kwargs, **options):
    """The call as a compiled function of its tensors; the options are constants of the graph."""
    return torch.compile(functools.partial(loss.function, **constants(kwargs)), fullgraph=True, **options)


def step(function, kwargs, names):
    """Value and gradients as a training step takes them."""
    inputs = requiring({k: v.clone() for k, v in tensors(kwargs).items()}, names)
    value = function(**inputs)
    value.sum().backward()
    return [value.detach(), *(inputs[name].grad for name in names)]


@some_cases
def test_compiles_as_one_graph(loss, case, real_device):
    kwargs = make(loss, case, torch.float32, real_device)
    names = differentiable(loss, kwargs)
    expected = step(functools.partial(loss.function, **constants(kwargs)), kwargs, names)
    answers = step(compiled(loss, kwargs, backend="aot_eager"), kwargs, names)
    for got, wanted in zip(answers, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@every_loss
@pytest.mark.slow
def test_compiles_with_inductor_inside_a_model(loss, real_device):
    """The compiler fuses the code around the loss; the loss is one operator of the graph."""
    kwargs = make(loss, next(iter(loss.cases)), torch.float32, real_device)
    names = differentiable(loss, kwargs)

    def model(**inputs):
        return loss.function(**kwargs | {k: v * 0.75 if k in names else v for k, v in inputs.items()}) * 3

    expected = step(model, kwargs, names)
    for got, wanted in zip(step(torch.compile(model, fullgraph=True), kwargs, names), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@fullest_case
def test_one_graph_serves_every_size(loss, case, real_device):
    counter = CompileCounterWithBackend("aot_eager")
    function, frames = None, []
    for n in (0, 1, 2):
        kwargs = make(loss, case, torch.float32, real_device, tuple(s + n for s in small_shape(loss)))
        names = differentiable(loss, kwargs)
        function = function or compiled(loss, kwargs, backend=counter, dynamic=True)
        expected = step(functools.partial(loss.function, **constants(kwargs)), kwargs, names)
        for got, wanted in zip(step(function, kwargs, names), expected, strict=True):
            torch.testing.assert_close(got, wanted)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], "compiled again for another size"


class RecordOps(TorchDispatchMode):
    """Every fastloss operator that runs, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace.startswith("fastloss"):
            self.calls.append((op, args, kwargs or {}))
        return op(*args, **kwargs or {})


@some_cases_in_one_dtype
def test_opcheck(loss, case, dtype, real_device):
    """Schema, fake kernel and dispatch of each operator that a call and its backward run."""
    kwargs = make(loss, case, dtype, real_device)
    with RecordOps() as record:
        fused(loss, kwargs, differentiable(loss, kwargs))
        fused(loss, kwargs, [])
    assert record.calls, "the loss runs none of fastloss's operators"
    for op, args, options in record.calls:
        differentiated = op.name().endswith("_fwd")  # a gradient is differentiated as that of its loss
        leaves = [
            a.detach().requires_grad_(a.requires_grad and differentiated)
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        ]
        torch.library.opcheck(op, tuple(leaves), options)


@pytest.mark.parametrize("layout", [transposed, strided, channels_last, expanded], ids=lambda f: f.__name__)
@some_cases
def test_fake_kernels_in_every_layout(loss, case, layout, real_device):
    """Fake results have the strides that the kernels' have, on which a compiler relies."""
    for shape in {small_shape(loss), max(loss.shapes, key=len)}:
        kwargs = make(loss, case, torch.float32, real_device, shape)
        names = differentiable(loss, kwargs)
        laid = requiring({k: lay(v, layout) if is_float(v) else v for k, v in kwargs.items()}, names)
        with RecordOps() as record:
            fused(loss, laid, names)
        assert record.calls or loss.name == "number_token_loss"  # which may take torch's operations
        for op, args, options in record.calls:
            plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            torch.library.opcheck(op, plain, options, test_utils=("test_schema", "test_faketensor"))


@some_dtypes
@some_cases
def test_fake_tensors_tell_shape_and_dtype(loss, case, dtype, real_device):
    kwargs = make(loss, case, dtype, real_device)
    names = differentiable(loss, kwargs)
    real = fused(loss, kwargs, names)
    mode = FakeTensorMode()
    fake = kwargs | {k: mode.from_tensor(v.detach()) for k, v in tensors(kwargs).items()}
    with mode:
        fake = requiring(fake, names)
        value = loss.function(**fake)
        grads = torch.autograd.grad(value.sum(), [fake[n] for n in names])
    for got, wanted in zip([value, *grads], [real.value, *real.grads.values()], strict=True):
        assert (got.shape, got.dtype, got.device) == (wanted.shape, wanted.dtype, wanted.device)


class AsModule(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values):
        return self.function(*values)


@some_cases
def test_export(loss, case, real_device):
    kwargs = requiring(make(loss, case, torch.float32, real_device), [])
    names = list(tensors(kwargs))
    module = AsModule(of_tensors(loss, kwargs, names))
    program = torch.export.export(module, tuple(kwargs[name] for name in names))
    other = make(loss, case, torch.float32, real_device, seed=1)
    values = [other[name].detach() for name in names]
    torch.testing.assert_close(program.module()(*values), module(*values))


# ---- autocast -------------------------------------------------------------------------------------------


@some_cases
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_gives_float32(loss, case, low, device):
    """As PyTorch's losses do; gradients come back in the inputs' own dtype."""
    for dtype in (low, torch.float32):
        kwargs = make(loss, case, dtype, device)
        names = differentiable(loss, kwargs)
        with torch.autocast(torch.device(device).type, low):
            value = loss.function(**kwargs)
        assert value.dtype == torch.float32
        wide = {k: v.detach().float() if is_float(v) else v for k, v in kwargs.items()}
        expected, near = fused(loss, wide, []).value, {}
        if loss.multiplies:  # in the autocast type
            near = {"rtol": 4 * torch.finfo(low).eps, "atol": 4 * torch.finfo(low).eps}
        torch.testing.assert_close(value.detach(), expected, **near)
        value.sum().backward()
        assert all(kwargs[name].grad.dtype == dtype for name in names)


@some_cases
def test_disabled_autocast_changes_nothing(loss, case, device):
    kwargs = make(loss, case, torch.bfloat16, device)
    names = differentiable(loss, kwargs)
    expected = fused(loss, kwargs, names)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=False):
        assert_same_bits(fused(loss, kwargs, names), expected, "autocast disabled")


# ---- CUDA graphs and the host ---------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
class TestCuda:
    @some_cases
    def test_host_does_not_wait(self, loss, case):
        kwargs = make(loss, case, torch.float32, "cuda")
        fused(loss, kwargs, differentiable(loss, kwargs))  # one-time set-up may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss.function(**kwargs).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @some_cases
    def test_captured_in_a_graph(self, loss, case):
        kwargs = make(loss, case, torch.float32, "cuda")
        names = differentiable(loss, kwargs)
        expected = fused(loss, kwargs, names)
        upstream = torch.ones_like(expected.value)

        def run():
            value = loss.function(**kwargs)
            return value.detach(), torch.autograd.grad(value, [kwargs[n] for n in names], upstream)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value, grads = run()
        for tensor in (value, *grads):
            tensor.zero_()
        graph.replay()
        wanted_value, wanted_grads = run()
        torch.testing.assert_close(value, wanted_value)
        for got, wanted in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(got, wanted)

    @some_cases
    def test_runs_on_the_current_stream(self, loss, case):
        kwargs = make(loss, case, torch.float32, "cuda")
        names = differentiable(loss, kwargs)
        expected = fused(loss, kwargs, names)
        late = {k: torch.zeros_like(v) if k in names else v for k, v in kwargs.items()}
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)  # the inputs are ready long after the call has been issued
            for name in names:
                late[name].copy_(kwargs[name].detach())
            assert_same_bits(fused(loss, late, names), expected, "on another stream")
