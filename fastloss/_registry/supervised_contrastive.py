"""Contrastive losses in which labels make the pairs."""

from __future__ import annotations

from fastloss._registry.contrastive import register_contrastive
from fastloss._registry.inputs import drawn_temperature, drawn_weight, labelled, two_sets
from fastloss.losses.supervised_contrastive import nt_xent_loss, pair_nt_xent_loss, sup_con_loss


def _among_more(name: str):
    """Draw keys that contain the rows or not."""

    def keys(offset: int | None):
        return {
            "keys": lambda d, s: d.normal(s[0] + 4, s[1]),
            "key_labels": lambda d, s: d.index(max(s[0] // 3, 2), s[0] + 4),
            "label_offset": offset,
        }

    return {
        "inputs": lambda d, s: labelled(name, d, s),
        "wrt": (name, "temperature", "keys"),
        "cases": {
            "plain": {"temperature": 0.2},
            "features as they are": {"temperature": 2.0, "normalize": False, "reduction": "sum"},
            "weighted": {"temperature": drawn_temperature, "sample_weight": drawn_weight},
            "others": {"temperature": 0.2, **keys(None)},
            "everything": {
                "temperature": drawn_temperature,
                "sample_weight": drawn_weight,
                "reduction": "none",
                **keys(2),
            },
        },
    }


register_contrastive(
    nt_xent_loss,
    "supervised_contrastive",
    inputs=lambda d, s: two_sets("z1", "z2", d, s),
    wrt=("z1", "z2", "temperature"),
    cases={
        "plain": {},
        "features as they are": {"normalize": False, "sample_weight": drawn_weight},
        "everything": {
            "temperature": drawn_temperature,
            "sample_weight": drawn_weight,
            "reduction": "none",
        },
    },
    bench_shape=(2048, 128),
)
register_contrastive(
    sup_con_loss,
    "supervised_contrastive",
    related="pytorch_metric_learning.losses.SupConLoss",
    bench_shape=(2048, 128),
    **_among_more("features"),
)
register_contrastive(
    pair_nt_xent_loss,
    "supervised_contrastive",
    related="pytorch_metric_learning.losses.NTXentLoss",
    bench_shape=(256, 128),
    **_among_more("embeddings"),
)
