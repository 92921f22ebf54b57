"""Completions of prompts: their log-probabilities, tokens and logits."""

from __future__ import annotations

import torch

from fastloss._registry import InputSampler


def logps(count, dtype=torch.float64, n=37, device="cpu", seed=0):
    draw = InputSampler(dtype, device, seed)
    return [draw.uniform(n, low=-9.0, high=-0.1).requires_grad_() for _ in range(count)]


def answers(dtype=torch.float64, device="cpu", shape=(6, 5, 11)):
    """Logits, chosen answers first, labels of which the last pair has none, and reference log-probabilities."""
    draw = InputSampler(dtype, device, 4)
    logits, labels = draw.normal(*shape, scale=2.0), draw.index(shape[-1], *shape[:-1])
    labels[0, 3:] = labels[4, :2] = labels[2] = labels[5] = -100
    return logits.requires_grad_(), labels, draw.normal(3) - 9, draw.normal(3) - 9


def tokens(dtype=torch.float64, shape=(5, 23), device="cpu", spread=0.4):
    draw = InputSampler(dtype, device, 3)
    logps = draw.uniform(*shape, low=-4.0, high=-0.1)
    old, ref = (logps + draw.normal(*shape, scale=spread) for _ in range(2))
    mask = draw.index(4, *shape) > 0
    mask[1] = False
    return logps.requires_grad_(), old, draw.normal(*shape), ref, mask
