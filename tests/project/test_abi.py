"""The interface of Python and the compiled library: registrations, names, errors for unknown ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastloss  # noqa: F401  registers the operators
from fastloss._ops import abi
from fastloss._ops.elementwise import ElementOp
from fastloss.reference import elementwise

ONLY_CPU = {"tile_walk", "linear_logits", "linear_dx", "linear_dw", "linear_scaled"}
ONLY_CUDA = {"tile_chunk", "linear_scale_"}
OPERATORS = torch.ops.fastloss


def operator_names() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("fastloss::") for name in names if name.startswith("fastloss::"))


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_every_operator_is_registered(key):
    """In a build without CUDA too: there it is the operator that says what is missing, not the dispatcher."""
    names = operator_names()
    assert len(names) > 50
    found = {
        name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastloss::{name}", key)
    }
    assert set(names) - found == (ONLY_CUDA if key == "CPU" else ONLY_CPU)


@pytest.mark.parametrize("name", ["sse2", "avx2", "avx", "AVX2", ""])  # in any case
def test_cpu_capability(name):
    run = subprocess.run(
        [sys.executable, "-c", "import fastloss; from fastloss import _C; print(_C.cpu_capability())"],
        env={**os.environ, "FASTLOSS_CPU_CAPABILITY": name}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if name == "avx":
        assert (
            run.returncode
            and (
                f"RuntimeError: FASTLOSS_CPU_CAPABILITY: expected one of sse2, avx2, avx512, amx, got '{name}'"
            )
            in run.stderr
        )
    else:
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() in ((name.lower(),) if name else ("sse2", "avx2", "avx512"))


def test_hyperparameters_go_by_name():
    op = abi.hparams("reference_free")
    given = dict(beta=2.0, margin=0.5, label_smoothing=0.1, nll_weight=0.0, alpha=0.25)
    hparams = op.pack(type="hinge", **given)
    assert len(hparams) == len(op.names) and op.unpack(hparams) == {"type": "hinge", **given}
    for wrong in ({k: v for k, v in given.items() if k != "beta"}, {**given, "betta": 1.0}):
        with pytest.raises(TypeError, match=r"reference_free\.hparams"):
            op.pack(type="hinge", **wrong)
    with pytest.raises(TypeError):
        op.pack("hinge", *given.values())
    with pytest.raises(KeyError):
        op.pack(type="ippo", **given)


def test_formula_that_takes_other_names_is_refused():
    with pytest.raises(TypeError, match=r"huber.*'beta'"):
        ElementOp("smooth_l1_loss", elementwise.huber)


def test_operators_refuse_what_is_unknown():
    x = torch.zeros(4)
    options = (-100, 0, False, 0)
    hparams = abi.hparams("dpo_loss").pack(
        type="ipo", beta=0.1, label_smoothing=0.0, divergence="js", alpha=0.5, tau=0.05, top=1.0
    )
    call = OPERATORS.dpo_loss_fwd
    call(x, x, x, x, None, None, 0, hparams, *options, False)
    for place, value in ((0, 12.0), (0, -1.0), (0, 0.5), (3, 4.0), (3, float("nan"))):
        unknown = [value if i == place else h for i, h in enumerate(hparams)]
        with pytest.raises(RuntimeError, match="hparams: expected the place of one of"):
            call(x, x, x, x, None, None, 0, unknown, *options, False)
    with pytest.raises(RuntimeError, match="hparams: expected 7 numbers, got 6"):
        call(x, x, x, x, None, None, 0, hparams[:-1], *options, False)
    with pytest.raises(RuntimeError, match="reduction: expected the place of one of none, mean, sum, got 3"):
        call(x, x, x, x, None, None, 3, hparams, *options, False)
    with pytest.raises(RuntimeError, match="kind: expected the place of one of"):
        OPERATORS.aggregate_fwd(x, None, None, 7, 0.5, 0.0, float("nan"))
    with pytest.raises(RuntimeError, match="kind: expected the place of one of"):
        OPERATORS.ranking_fwd(x.view(2, 2), x.view(2, 2), 2)
    with pytest.raises(RuntimeError, match="hparams: expected 2 numbers, got 3"):
        OPERATORS.gae_fwd(x, x, None, None, None, None, None, None, None, [1.0, 1.0, 1.0])
    logits, target = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="hparams: expected 2 numbers, got 1"):
        OPERATORS.cross_entropy_fwd(logits, target, None, None, -100, 1, 1.0, 0.0, [0.0], False, False)
