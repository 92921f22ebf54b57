"""Contrastive losses of two sets of features."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastloss import reference
from fastloss._registry.inputs import drawn_temperature, drawn_weight, two_sets
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.contrastive import clip_loss, info_nce, siglip_loss

FEATURE_SHAPES = ((5, 7), (1, 3), (23, 16), (4, 33), (210, 40))


def register_contrastive(function: Callable[..., Tensor], family: str = "contrastive", **entry) -> None:
    register(
        Loss(
            name=function.__name__,
            family=family,
            function=function,
            reference=getattr(reference, function.__name__),
            products=(1, 3),
            shapes=FEATURE_SHAPES,
            traffic=lambda shape, itemsize, backward: (4 if backward else 2) * shape[0] * shape[1] * itemsize,
            **entry,
        )
    )


def _images_and_texts(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    scale = draw.uniform(low=4.0, high=6.0)
    return two_sets("image_features", "text_features", draw, shape) | {"logit_scale": scale}


register_contrastive(
    clip_loss,
    related="open_clip.ClipLoss",
    inputs=_images_and_texts,
    wrt=("image_features", "text_features", "logit_scale"),
    cases={
        "plain": {},
        "number": {"logit_scale": 10.0, "reduction": "sum"},
        "everything": {"normalize": True, "reduction": "none", "sample_weight": drawn_weight},
    },
    bench_shape=(8192, 256),
)
register_contrastive(
    siglip_loss,
    related="open_clip.SigLipLoss",
    inputs=_images_and_texts,
    wrt=("image_features", "text_features", "logit_scale", "logit_bias"),
    cases={
        "plain": {},
        "bias": {"logit_bias": lambda d, s: d.uniform(low=-5.0, high=-3.0)},
        "gathered": {
            "text_features": lambda d, s: d.normal(s[0] + 3, s[1], scale=s[1] ** -0.5),
            "label_offset": 2,
            "reduction": "none",
        },
        "everything": {
            "logit_bias": lambda d, s: d.uniform(low=-5.0, high=-3.0),
            "normalize": True,
            "reduction": "sum",
            "sample_weight": drawn_weight,
        },
    },
    bench_shape=(4096, 512),
)
register_contrastive(
    info_nce,
    replaces="info_nce.info_nce",
    inputs=lambda d, s: two_sets("query", "positive_key", d, s),
    wrt=("query", "positive_key", "negative_keys", "temperature"),
    cases={
        "plain": {"temperature": 0.2},
        "features as they are": {"temperature": drawn_temperature, "normalize": False, "reduction": "none"},
        "unpaired": {
            "negative_keys": lambda d, s: d.normal(2 * s[0] + 1, s[1]),
            "temperature": drawn_temperature,
        },
        "paired": {
            "negative_keys": lambda d, s: d.normal(s[0], 4, s[1]),
            "negative_mode": "paired",
            "temperature": 0.2,
        },
        "everything": {
            "temperature": drawn_temperature,
            "reduction": "sum",
            "sample_weight": drawn_weight,
        },
    },
    bench_shape=(4096, 512),
)
