"""Preference losses without a reference model, and KTO."""

from __future__ import annotations

from fastloss import reference
from fastloss._registry.inputs import LOGPS_BENCH, LOGPS_SHAPES, logps, of_logps, traffic_of
from fastloss._registry.spec import Loss, register
from fastloss.losses.preference import alpha_po_loss, cpo_loss, kto_loss, orpo_loss, simpo_loss

register(
    Loss(
        name="kto_loss",
        family="preference",
        function=kto_loss,
        reference=reference.kto_loss,
        related="trl.KTOTrainer",
        inputs=lambda d, s: {
            "policy_logps": logps(d, s),
            "reference_logps": logps(d, s),
            "labels": d.index(2, *s).bool(),
        },
        wrt=("policy_logps", "reference_logps"),
        trained=("policy_logps",),
        cases={
            "plain": {},
            "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "reduction": "sum"},
            "weights": {
                "kl": lambda d, s: d.uniform(*s),
                "desirable_weight": 1.5,
                "undesirable_weight": 0.75,
                "reduction": "none",
            },
        },
        shapes=LOGPS_SHAPES,
        bench_shape=LOGPS_BENCH,
        traffic=traffic_of(3, 1),
    )
)
for _function, _cases in (
    (simpo_loss, {"plain": {}, "hinge": {"loss_type": "hinge"}}),
    (
        cpo_loss,
        {
            "plain": {},
            "hinge": {"loss_type": "hinge"},
            "ipo": {"loss_type": "ipo"},
            "nll": {"chosen_nll": logps, "alpha": 0.5, "label_smoothing": 0.1, "reduction": "none"},
        },
    ),
    (alpha_po_loss, {"smoothed": {"alpha": 0.5, "label_smoothing": 0.1, "reduction": "sum"}}),
    (orpo_loss, {"plain": {}}),
):
    _names = (
        "chosen_logps",
        "rejected_logps",
        *(("chosen_nll",) if _function in (cpo_loss, orpo_loss) else ()),
    )
    register(
        Loss(
            name=_function.__name__,
            family="preference",
            function=_function,
            reference=getattr(reference, _function.__name__),
            inputs=of_logps("chosen_logps", "rejected_logps"),
            wrt=_names,
            cases=_cases,
            shapes=LOGPS_SHAPES,
            bench_shape=LOGPS_BENCH,
            traffic=traffic_of(2, 2),
        )
    )
