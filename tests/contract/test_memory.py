"""The pool of warm buffers behind gradients on the CPU, and how much memory a call needs at its peak."""

from __future__ import annotations

import gc
import itertools
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import differentiable, make, one_of_each_driver, one_of_each_family, requiring, same_bits

import fastloss
from fastloss import memory

MiB = 1 << 20


def large_shape(loss, bytes=4 * MiB):
    """The largest listed shape, with as many more rows as it takes for float32 logits of that size."""
    shape = max((s for s in loss.shapes if len(s) > 1), key=math.prod)
    return (shape[0] * math.ceil(bytes / 4 / math.prod(shape)), *shape[1:])


def gradient(loss, seed=0, bytes=4 * MiB):
    kwargs = make(loss, next(iter(loss.cases)), torch.float32, shape=large_shape(loss, bytes), seed=seed)
    name = differentiable(loss, kwargs)[0]
    kwargs = requiring(kwargs, [name])
    loss.function(**kwargs).sum().backward()
    return kwargs[name].grad


@pytest.fixture(autouse=True)
def pool():
    """An empty pool; what the test leaves behind and sets is put right."""
    gc.collect()
    memory.empty_cache()
    before = memory.stats()
    yield before
    gc.collect()
    memory.set_limit(before["limit_bytes"])
    memory.empty_cache()
    assert memory.stats()["in_use_bytes"] == before["in_use_bytes"], "a buffer was not given back"


def test_statistics(pool):
    assert set(pool) == {"in_use_bytes", "cached_bytes", "peak_in_use_bytes", "limit_bytes", "hits", "misses"}
    assert all(isinstance(v, int) and v >= 0 for v in pool.values())
    assert pool["cached_bytes"] == 0
    assert 0 < pool["limit_bytes"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@one_of_each_family
def test_buffer_is_used_again(loss, pool):
    first = gradient(loss)
    used = memory.stats()
    size = used["in_use_bytes"] - pool["in_use_bytes"]
    assert first.nbytes <= size <= 1.25 * first.nbytes + 4 * MiB
    assert used["misses"] > pool["misses"]
    address = first.data_ptr()
    del first
    freed = memory.stats()
    assert freed["cached_bytes"] == size
    assert freed["in_use_bytes"] == pool["in_use_bytes"]
    second = gradient(loss)
    assert second.data_ptr() == address
    again = memory.stats()
    assert (again["hits"], again["misses"]) == (freed["hits"] + 1, freed["misses"])
    assert again["peak_in_use_bytes"] >= again["in_use_bytes"]


@one_of_each_driver
def test_living_tensors_share_nothing(loss):
    """Gradients, and views of dead gradients, keep their numbers while others come and go."""
    kept = [gradient(loss, seed) for seed in range(3)]
    views = [gradient(loss, seed)[1:] for seed in range(3, 5)]
    copies = [g.clone() for g in kept + views]
    for seed in range(5, 8):
        gradient(loss, seed).fill_(math.nan)
    memory.empty_cache()
    gradient(loss, 9)
    assert all(same_bits(g, c) for g, c in zip(kept + views, copies, strict=True))
    spans = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in kept + views)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


@one_of_each_driver
def test_empty_cache(loss):
    alive, dead = gradient(loss), gradient(loss, 1)
    copy = alive.clone()
    del dead
    assert memory.stats()["cached_bytes"] > 0
    memory.empty_cache()
    assert memory.stats()["cached_bytes"] == 0
    assert same_bits(alive, copy)


@one_of_each_driver
@pytest.mark.slow
def test_limit(loss):
    """The cache stays within the limit for any sequence of sizes, and a limit of 0 caches nothing."""
    for limit in (0, 8 * MiB, 20 * MiB):
        memory.set_limit(limit)
        for megabytes in (2, 9, 3, 5, 12, 4, 25, 2):
            gradient(loss, bytes=megabytes * MiB)
            assert memory.stats()["cached_bytes"] <= limit
    del megabytes
    assert memory.stats()["cached_bytes"] > 0
    memory.set_limit(0)
    assert memory.stats()["cached_bytes"] == 0
    with pytest.raises(ValueError, match="bytes"):
        memory.set_limit(-1)
    with pytest.raises(TypeError):
        memory.set_limit("1 GiB")


@one_of_each_driver
def test_storages_of_torch_where_there_is_no_pool(loss):
    """Of a pool of 0 bytes a gradient is not: it can be resized, as those do who shard and offload."""
    memory.set_limit(0)
    large = gradient(loss)
    assert memory.stats()["in_use_bytes"] == 0
    size = large.untyped_storage().size()
    large.untyped_storage().resize_(0)
    large.untyped_storage().resize_(size)
    large.resize_(2 * large.shape[0], *large.shape[1:])


@one_of_each_family
def test_nothing_is_taken_without_gradient(loss, pool):
    kwargs = make(loss, next(iter(loss.cases)), torch.float32, shape=large_shape(loss))
    with torch.no_grad():
        loss.function(**kwargs)
    after = memory.stats()
    assert (after["hits"], after["misses"]) == (pool["hits"], pool["misses"])


@one_of_each_family
def test_graph_that_is_dropped_gives_its_memory_back(loss, pool):
    kwargs = make(loss, next(iter(loss.cases)), torch.float32, shape=large_shape(loss))
    value = loss.function(**kwargs)
    del value
    assert memory.stats()["in_use_bytes"] == pool["in_use_bytes"]


@one_of_each_driver
def test_threads(loss, pool):
    """Calls from several threads at once, gradients freed by a thread that did not make them."""
    expected = {seed: gradient(loss, seed, (1 + seed % 3) * MiB).clone() for seed in range(6)}
    wrong, handed_over, lock = [], [], threading.Lock()

    def work(seed):
        for _ in range(5):
            grad = gradient(loss, seed, (1 + seed % 3) * MiB)
            if not same_bits(grad, expected[seed]):
                wrong.append(seed)
            with lock:
                handed_over.append(grad)
                if len(handed_over) > 4:
                    handed_over.pop(0)
            del grad

    workers = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    handed_over.clear()
    assert memory.stats()["in_use_bytes"] == pool["in_use_bytes"]


# ---- processes ------------------------------------------------------------------------------------------

PRELUDE = """
import gc, os, sys, threading, torch
import fastloss
from fastloss import memory
from fastloss._registry import InputSampler, losses
import test_memory
loss, = losses(sys.argv[1])
def gradient(seed=0, megabytes=4):
    return test_memory.gradient(loss, seed, megabytes << 20)
"""


def run_child(loss, body):
    places = [Path(__file__).parent, Path(fastloss.__file__).parents[1], *filter(None, sys.path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    child = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PRELUDE + body, loss.name],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, f"exit code {child.returncode}\n{child.stdout}\n{child.stderr}"
    assert not child.stderr, child.stderr


@one_of_each_driver
@pytest.mark.slow
def test_fork(loss):
    """A child starts without the parent's cache, may free and make gradients, and does not disturb it."""
    run_child(
        loss,
        """
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
mine, dead = gradient(0), gradient(1)
copy = mine.clone()
del dead
cached = memory.stats()["cached_bytes"]
assert cached > 0
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert memory.stats()["cached_bytes"] == 0
            ok = torch.equal(mine, copy)
            mine.fill_(7)
            del mine
            for seed in range(4):
                ok = ok and torch.equal(gradient(0), copy)
            code = 0 if ok else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert torch.equal(mine, copy)
    assert memory.stats()["cached_bytes"] == cached
""",
    )


@one_of_each_driver
@pytest.mark.slow
def test_fork_while_other_threads_allocate(loss):
    """The pool's lock is never left taken in a child."""
    run_child(
        loss,
        """
torch.set_num_threads(1)
gradient()
stop = False
def churn():
    while not stop:
        gradient(megabytes=1)
threads = [threading.Thread(target=churn) for _ in range(2)]
for t in threads: t.start()
pids = []
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        memory.stats(); memory.empty_cache()
        os._exit(0)
    pids.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
stop = True
for t in threads: t.join()
assert codes == [0] * 20, codes
""",
    )


@one_of_each_driver
@pytest.mark.slow
def test_interpreter_shutdown(loss):
    """Gradients that are alive when Python ends, in globals, modules and cycles, do no harm."""
    run_child(
        loss,
        """
kept = gradient(0)
class Cycle: pass
cycle = Cycle(); cycle.me = cycle; cycle.grad = gradient(1)
sys.modules["late"] = cycle
import atexit
atexit.register(lambda: gradient(2))
gradient(3)
""",
    )


@one_of_each_family
@pytest.mark.slow
def test_memory_from_outside(loss):
    """As the system sees it: the cache goes back to it, and a call needs one tensor of its inputs' size.

    That is the gradient; none in place and without a gradient, one more with a kept graph. Flags and labels that
    are as many as the inputs are read as numbers of the inputs' type: one more for each.
    """
    run_child(
        loss,
        """
from support import differentiable, has_argument, make, requiring
from fastloss._registry.inputs import in_place
MEGABYTES = 96
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
def anonymous():  # without the pages of libraries, which the system may drop meanwhile
    pages = open("/proc/self/statm").read().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE") / 2**20
def peak():
    line, = (l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
def extra(wanted, retain_graph=False, function=loss.function, **options):
    shape = test_memory.large_shape(loss, MEGABYTES << 20)
    kwargs = make(loss, next(iter(loss.cases)), torch.float32, shape=shape, **options)
    kwargs = requiring(kwargs, differentiable(loss, kwargs)[:1])
    memory.empty_cache(); gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
    before = resident()
    with torch.set_grad_enabled(wanted):
        value = function(**kwargs)
    if wanted:
        value.sum().backward(retain_graph=retain_graph)
    return (peak() - before - value.nbytes / 2**20) / MEGABYTES

gradient(); memory.empty_cache()
before = anonymous()
for _ in range(3):  # another process may take the memory meanwhile
    gradient(megabytes=MEGABYTES)
    kept = anonymous() - before
    if kept > 0.8 * MEGABYTES:
        break
assert kept > 0.8 * MEGABYTES, kept
memory.empty_cache()
assert anonymous() - before < 0.2 * MEGABYTES

needs = {"gradient": (extra(True), 1), "no gradient": (extra(False), 0), "graph": (extra(True, True), 2)}
if has_argument(loss, "reduction"):
    needs["none"] = extra(True, reduction="none"), 1
if has_argument(loss, "inplace_backward"):
    needs["in place"] = extra(True, function=in_place(loss.function)), 0
some = make(loss, next(iter(loss.cases)), torch.float32)
like = some[differentiable(loss, some)[0]].shape
flags = sum(1.25 for x in some.values() if torch.is_tensor(x) and not x.is_floating_point() and x.shape == like)
for name, (got, allowed) in needs.items():
    allowed += flags
    assert got < allowed + 0.15, f"{name}: {got:.2f} tensors, allowed {allowed}"
""",
    )
