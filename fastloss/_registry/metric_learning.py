"""Losses of pairs and triplets of features."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.metric_learning import (
    batch_all_triplet_loss,
    batch_hard_triplet_loss,
    contrastive_loss,
    cosine_embedding_loss,
    kelp_ranking_loss,
    triplet_margin_loss,
)


def _drawn(*names: str):
    return lambda draw, shape: {name: draw.normal(*shape) for name in names}


def _pair(name: str, low: int, step: int):
    def inputs(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
        rows = {"input1": draw.normal(*shape), "input2": draw.normal(*shape)}
        return rows | {name: draw.index(2, shape[0]) * step + low}

    return inputs


def register_metric(function: Callable[..., Tensor], case: dict, **entry) -> None:
    register(
        Loss(
            name=function.__name__,
            family="metric_learning",
            function=function,
            reference=getattr(reference, function.__name__),
            cases={"plain": {}, **case},
            shapes=((5, 7), (1, 9), (23, 16), (4, 33), (70, 200)),
            traffic=lambda shape, itemsize, backward: (
                (3 if backward else 1) * len(entry["wrt"]) * shape[0] * shape[1] * itemsize
            ),
            **entry,
        )
    )


register_metric(
    cosine_embedding_loss,
    {"everything": {"margin": -0.5, "reduction": "none"}},
    replaces="torch.nn.functional.cosine_embedding_loss",
    inputs=_pair("target", -1, 2),
    wrt=("input1", "input2"),
    bench_shape=(65536, 256),
)
register_metric(
    triplet_margin_loss,
    {
        "swap": {"swap": True, "margin": 0.5},
        "p=1": {"p": 1.0, "reduction": "sum"},
        "everything": {"squared": True, "swap": True, "margin": 2.0, "reduction": "none"},
    },
    replaces="torch.nn.functional.triplet_margin_loss",
    inputs=_drawn("anchor", "positive", "negative"),
    wrt=("anchor", "positive", "negative"),
    bench_shape=(65536, 256),
)
register_metric(
    contrastive_loss,
    {"everything": {"margin": 6.0, "reduction": "none"}},
    inputs=_pair("label", 0, 1),
    wrt=("input1", "input2"),
    bench_shape=(65536, 256),
)
register_metric(
    kelp_ranking_loss,
    {"mean": {"variant": "mean_cosine"}, "everything": {"margin": 0.3, "reduction": "none"}},
    inputs=_drawn("query", "positive", "negative"),
    wrt=("query", "positive", "negative"),
    bench_shape=(65536, 256),
)


def _labelled(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"embeddings": draw.normal(*shape), "labels": draw.index(max(shape[0] // 3, 2), shape[0])}


register_metric(
    batch_hard_triplet_loss,
    {
        "soft": {"margin": None, "reduction": "sum"},
        "cosine": {"distance": "cosine", "margin": 0.2},
        "everything": {"distance": "squared", "margin": 3.0, "reduction": "none"},
    },
    related="sentence_transformers.losses.BatchHardTripletLoss",
    inputs=_labelled,
    wrt=("embeddings",),
    products=(1, 1),
    bench_shape=(1024, 128),
)
register_metric(
    batch_all_triplet_loss,
    {
        "cosine": {"distance": "cosine", "margin": 0.2},
        "two classes": {"labels": lambda d, s: d.index(2, s[0]), "margin": 1.0, "reduction": "sum"},
        "everything": {"distance": "squared", "margin": 30.0, "reduction": "none"},
    },
    related="sentence_transformers.losses.BatchAllTripletLoss",
    inputs=_labelled,
    wrt=("embeddings",),
    bench_shape=(256, 128),
)
