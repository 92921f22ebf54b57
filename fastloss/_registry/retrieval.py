"""Ranking losses of queries and documents."""

from __future__ import annotations

from fastloss._registry.contrastive import register_contrastive
from fastloss._registry.inputs import drawn_weight, two_sets
from fastloss.losses.retrieval import DIRECTIONS, multiple_negatives_ranking_loss

register_contrastive(
    multiple_negatives_ranking_loss,
    "retrieval",
    related="sentence_transformers.losses.MultipleNegativesRankingLoss",
    inputs=lambda d, s: two_sets("anchor", "positive", d, s),
    wrt=("anchor", "positive", "negatives", "scale"),
    cases={
        "plain": {"scale": 5.0},
        "hard negatives": {
            "negatives": lambda d, s: d.normal(2, *s),
            "scale": lambda d, s: d.uniform(low=4.0, high=6.0),
            "ids": lambda d, s: d.index(3 * s[0], s[0]),
        },
        "four directions": {
            "positive": lambda d, s: d.normal(s[0] + 2, s[1]),
            "negatives": lambda d, s: d.normal(s[0] + 2, s[1]),
            "directions": DIRECTIONS,
            "label_offset": 1,
            "scale": lambda d, s: d.uniform(low=4.0, high=6.0),
            "sample_weight": drawn_weight,
            "reduction": "sum",
        },
        "gathered": {
            "positive": lambda d, s: d.normal(s[0] + 3, s[1]),
            "negatives": lambda d, s: d.normal(s[0] + 3, s[1]),
            "directions": DIRECTIONS[:3],
            "ids": lambda d, s: d.index(3 * s[0] + 3, s[0] + 3),
            "scale": 5.0,
            "label_offset": 2,
        },
        "everything": {
            "positive": lambda d, s: d.normal(s[0] + 1, s[1]),
            "negatives": lambda d, s: d.normal(2, s[0] + 1, s[1]),
            "normalize": False,
            "directions": DIRECTIONS[:2],
            "partition_mode": "per_direction",
            "scale": lambda d, s: d.uniform(low=0.4, high=0.6),
            "sample_weight": drawn_weight,
            "reduction": "none",
            "label_offset": 1,
        },
    },
    bench_shape=(2048, 384),
)
