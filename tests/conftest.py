"""Devices of the suite: `cpu`, `cuda` where torch sees a GPU, and `simt`, the CUDA kernels run by the CPU."""

from __future__ import annotations

import fnmatch
import gc
import os

import hypothesis
import pytest
import torch
from support import EXCEPTIONS
from support.pairs import of_every_pair

import fastloss._ops.autograd

# Results must not depend on the machine's mood: the same examples on every run.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


collect_ignore = [] if torch.cuda.is_available() else ["contract/test_cuda_graphs.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cpu,simt,cuda" if torch.cuda.is_available() else "cpu,simt"
    parser.addoption("--devices", default=default, help=f"comma-separated; default {default}")
    parser.addoption("--quick", action="store_true", help="one dtype, device and case of every family")
    parser.addoption(
        "--full", action="store_true", help="every combination of a test's parameters, not every pair"
    )
    parser.addoption("--large", action="store_true", help="run tests marked large whatever the memory")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs about 10 GiB of free memory")
    config.addinivalue_line("markers", "slow: takes ten seconds or more, and is left out of a quick run")


def devices(config: pytest.Config) -> list[str]:
    if config.getoption("--quick"):
        return ["cpu"]
    return config.getoption("--devices").split(",")


def pytest_report_header(config: pytest.Config) -> str:
    absent = "" if torch.cuda.is_available() else " (cuda left out: torch sees no GPU)"
    return f"fastloss devices: {', '.join(devices(config))}{absent}; threads: {torch.get_num_threads()}"


# What these files ask is answered by the Python layer, which is the same over every build of the kernels.
ABOVE_THE_KERNELS = ("test_autograd", "test_errors", "test_memory")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = devices(metafunc.config)
    if metafunc.module.__name__ in ABOVE_THE_KERNELS:
        chosen = [d for d in chosen if d != "simt"]
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", chosen, indirect=True)
    if "real_device" in metafunc.fixturenames:
        metafunc.parametrize("real_device", [d for d in chosen if d != "simt"])


def available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Of these, seconds each, a quick run takes one item for every function instead of one for every family.
SLOW_FILES = (
    "test_compile",
    "test_memory",
    "test_distributed",
    "test_distributed_contrastive",
    "test_benchmarks",
)


def quick_key(item: pytest.Item) -> tuple[str, str]:
    """What a quick run has one item of: a test function, and the family of the loss that it is about."""
    loss = getattr(item, "callspec", None) and item.callspec.params.get("loss")
    slow = item.path.stem in SLOW_FILES
    return item.nodeid.split("[")[0], "" if slow or loss is None else getattr(loss, "family", "")


def is_quick(item: pytest.Item) -> bool:
    """Leave out sanitizers, builds of the CUDA kernels, what needs much memory, and dtypes but float32."""
    params = (getattr(item, "callspec", None) and item.callspec.params) or {}
    return (
        item.path.parent.name != "cuda_on_cpu"
        and item.path.stem not in ("test_gemm", "test_package")  # which compile and install
        and "simt_library" not in getattr(item, "fixturenames", ())
        and item.get_closest_marker("large") is None
        and item.get_closest_marker("slow") is None
        and params.get("dtype", torch.float32) == torch.float32
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        first = {quick_key(item): item for item in reversed(items) if is_quick(item)}
        kept = set(map(id, first.values()))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = [item for item in items if id(item) in kept]
    elif not config.getoption("--full"):
        items[:] = of_every_pair(items)
    for item in items:
        for pattern, reason in EXCEPTIONS.items():
            if fnmatch.fnmatchcase(item.name, pattern.replace("[", "[[]", 1)):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    if config.getoption("--large") or available_memory() > 12 << 30:
        return
    for item in items:
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason="less than 12 GiB of memory is free; --large forces it"))


def pytest_collection_finish() -> None:
    """Take the items, tens of thousands of objects, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def simt_library() -> str:
    from cuda_on_cpu import build

    build.load("plain")
    return "fastloss_simt"


@pytest.fixture
def device(request: pytest.FixtureRequest):
    """The torch device on which to make tensors; `simt` routes calls on CPU tensors to the CUDA kernels."""
    if request.param != "simt":
        yield request.param
        return
    with fastloss._ops.autograd.use_namespace(request.getfixturevalue("simt_library")):
        yield "cpu"


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
