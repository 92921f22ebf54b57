"""On a GPU: every loss can be captured in a CUDA graph, forward and backward. Collected only where there is one."""

from __future__ import annotations

import torch
from support import differentiable, every_loss, make, requiring, same_bits, small_shape


def step(loss, kwargs, names):
    value = loss.function(**kwargs).sum()
    return value, *torch.autograd.grad(value, [kwargs[name] for name in names])


@every_loss
def test_replay_on_other_numbers(loss):
    case = next(iter(loss.cases))
    kwargs, other = (make(loss, case, torch.float32, "cuda", small_shape(loss), seed=seed) for seed in (0, 1))
    names = differentiable(loss, kwargs)
    static = requiring({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}, names)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(loss, static, names)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(loss, static, names)
    with torch.no_grad():
        for name, value in other.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
    graph.replay()
    for got, expected in zip(results, step(loss, other, names), strict=True):
        assert same_bits(got, expected)
