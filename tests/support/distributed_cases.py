"""What the contrastive losses are called with over several processes, and the share of it that a rank has."""

from __future__ import annotations

import torch

ROWS = 13
FEATURES = 6


def drawn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def two(first, second):
    return {first: drawn(ROWS, FEATURES, seed=1), second: drawn(ROWS, FEATURES, seed=2)}


NUMBERS = ("logit_scale", "logit_bias", "temperature", "scale")
WEIGHT = drawn(ROWS, seed=3).abs()
IMAGES, QUERIES, ANCHORS = (
    two(*names)
    for names in (("image_features", "text_features"), ("query", "positive_key"), ("anchor", "positive"))
)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 9, 0, 1, 0, 8, 7])  # 3, 9, 8 and 7 are alone
IDS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 10, 11, 3])
A, TAU = torch.tensor(2.0, dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
HARD = drawn(2, ROWS, FEATURES, seed=4)
CASES = {
    "clip": ("clip_loss", IMAGES | {"logit_scale": A}),
    "clip, everything": (
        "clip_loss",
        IMAGES | {"logit_scale": A, "logit_bias": TAU, "sample_weight": WEIGHT, "normalize": True},
    ),
    "siglip": ("siglip_loss", IMAGES | {"logit_scale": A}),
    "siglip, everything": (
        "siglip_loss",
        IMAGES | {"logit_scale": A, "logit_bias": -TAU, "sample_weight": WEIGHT, "normalize": True},
    ),
    "siglip, no pairs": ("siglip_loss", IMAGES | {"logit_scale": A, "label_offset": None}),
    "info_nce": ("info_nce", QUERIES | {"temperature": TAU, "sample_weight": WEIGHT}),
    "info_nce, unpaired": (
        "info_nce",
        QUERIES | {"temperature": TAU, "negative_keys": drawn(ROWS, FEATURES, seed=5), "normalize": False},
    ),
    "info_nce, paired": (
        "info_nce",
        QUERIES
        | {"temperature": TAU, "negative_keys": drawn(ROWS, 3, FEATURES), "negative_mode": "paired"},
    ),
    "sup_con": ("sup_con_loss", {"features": drawn(ROWS, FEATURES), "labels": LABELS, "temperature": TAU}),
    "sup_con, everything": (
        "sup_con_loss",
        {"features": drawn(ROWS, FEATURES), "labels": LABELS, "temperature": 5 * TAU}
        | {"sample_weight": WEIGHT, "normalize": False},
    ),
    "nt_xent": ("nt_xent_loss", two("z1", "z2") | {"temperature": TAU}),
    "nt_xent, everything": (
        "nt_xent_loss",
        two("z1", "z2") | {"temperature": 5 * TAU, "sample_weight": WEIGHT, "normalize": False},
    ),
    "ranking": ("multiple_negatives_ranking_loss", ANCHORS | {"scale": A, "ids": IDS}),
    "ranking, hard negatives": (
        "multiple_negatives_ranking_loss",
        ANCHORS | {"scale": A, "negatives": HARD, "ids": IDS, "directions": ("query_to_doc", "doc_to_query")}
        | {"partition_mode": "per_direction", "sample_weight": WEIGHT},
    ),
    "ranking, four directions": (
        "multiple_negatives_ranking_loss",
        ANCHORS | {"scale": A, "negatives": HARD[0]}
        | {"directions": ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")},
    ),
}  # fmt: skip


def arguments(case, dtype):
    """Of one process: its own tensors, which take gradients."""
    name, given = CASES[case]
    whole = {}
    for key, value in given.items():
        whole[key] = value
        if isinstance(value, torch.Tensor):
            # a weight of siglip_loss that takes one goes through the reference, to which other bits belong
            differentiable = value.is_floating_point() and (key, name) != ("sample_weight", "siglip_loss")
            whole[key] = value.to(dtype) if value.is_floating_point() else value
            whole[key] = whole[key].clone().requires_grad_(differentiable)
    return name, whole


def part(name, value, rows):
    """This rank's rows of an argument, or the whole where all ranks hold it."""
    if not isinstance(value, torch.Tensor) or name in NUMBERS:
        return value
    return value[:, rows] if name == "negatives" and value.dim() == 3 else value[rows]


def of_this_rank(whole, rows):
    mine = {}
    for name, value in whole.items():
        mine[name] = part(name, value, rows)
        if isinstance(value, torch.Tensor):
            mine[name] = mine[name].detach().clone().requires_grad_(value.requires_grad)
    return mine
