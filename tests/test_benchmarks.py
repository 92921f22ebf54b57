"""What lies in `benchmarks` names what there is, and works without anything being installed for it."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

from fastloss._registry import losses
from fastloss.check import compare

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DEVICES = ("cpu", "cuda")


@pytest.fixture
def file():
    return runpy.run_path(str(BENCHMARKS / "peers.py"))


def seen_by(file, monkeypatch, **names):
    """The names in the file's own functions replaced."""
    for name, value in names.items():
        monkeypatch.setitem(file["peers"].__globals__, name, value)
    return file["peers"]


def test_peers_are_of_losses_that_there_are(file):
    assert set(file["PROVIDERS"]) <= {loss.name for loss in losses()}
    ours = {"eager", "torch.compile", "fastloss", "fastloss in place", "copy", "products"}
    for providers in file["PROVIDERS"].values():
        assert not ours & set(providers)
        for module, where, load in providers.values():
            assert module.replace(".", "_").isidentifier()
            assert set(where) <= set(DEVICES)
            assert callable(load)


def test_peers_that_are_not_installed_are_left_out(file, monkeypatch):
    def no_parent(module):
        raise ModuleNotFoundError(module)

    for find in (lambda module: None, no_parent):
        peers = seen_by(file, monkeypatch, find_spec=find)
        assert not any(peers(loss, device) for loss in file["PROVIDERS"] for device in DEVICES)


def test_peers_run_where_they_can(file, monkeypatch):
    peers = seen_by(file, monkeypatch, find_spec=lambda module: module)
    for loss, providers in file["PROVIDERS"].items():
        assert set(peers(loss, "cuda")) == set(providers)
        assert set(peers(loss, "cpu")) == {k for k, (_, where, _) in providers.items() if "cpu" in where}
    assert peers("a loss without peers", "cpu") == {}


def test_a_peer_that_cannot_be_imported_raises_only_when_it_is_called(file, monkeypatch):
    def broken():
        raise RuntimeError("operator does not exist")

    peers = seen_by(file, monkeypatch, PROVIDERS={"a loss": {"other": ("torch", ("cpu",), broken)}})
    with pytest.raises(ImportError, match=r"torch cannot be imported here: operator does not exist"):
        peers("a loss", "cpu")["other"]()


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has no chunks")
def test_a_peer_gives_what_fastloss_gives_or_raises(file):
    peer = file["peers"]("linear_cross_entropy", "cpu")["torch in chunks"]
    result = compare("linear_cross_entropy", "plain", (7, 200, 130), torch.float32, function=peer)
    assert result.relative < torch.finfo(torch.float32).eps ** 0.5
    with pytest.raises(TypeError, match="logit_scale"):
        compare("linear_cross_entropy", "everything", (7, 200, 130), torch.float32, function=peer)


def test_the_sanitizer_sees_every_case_and_every_shape():
    calls = runpy.run_path(str(BENCHMARKS / "every_loss.py"))["calls"]
    for loss in losses():
        cases, shapes = zip(*calls(loss), strict=True)
        assert set(cases) == set(loss.cases)
        assert set(shapes) == set(loss.shapes)
        assert max(map(math.prod, loss.shapes)) <= 2**20


def test_cost_of_a_call():
    measure = runpy.run_path(str(BENCHMARKS / "overhead.py"))["measure"]
    row = measure(losses()[0], 1, "cpu")
    assert row["eager"] > 0
    assert row["fastloss"] > 0
