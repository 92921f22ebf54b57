"""The shim itself: it gives kernels what CUDA gives them, and its builds find the mistakes they are for."""

from __future__ import annotations

import re
import subprocess

import pytest

from . import build

SCHEDULES = (0, 1, 5)
DIVERGED = "names lanes that have returned or do not exist"
RACE = "data race on {} memory"


def in_all(words: str) -> dict[str, str]:
    return dict.fromkeys(build.MODES, words)


# What must find each planted mistake, and the words in which; several schedules may be needed.
MUST_FIND: dict[str, dict[str, str]] = {
    "barrier_in_both_branches": in_all("the block diverged: __syncthreads at planted.cu"),
    "return_before_barrier": in_all("deadlock: 1 thread.s. returned .first: 5.; 63 thread"),
    "caller_outside_mask": in_all("the caller is not in its mask"),
    "shuffle_from_absent_lane": in_all("reads lane 16, which is not taking part"),
    "lanes_at_different_collectives": in_all("meet at different collectives"),
    "lanes_with_different_masks": in_all(f"{DIVERGED}|meet at different collectives"),
    "full_mask_in_part_of_warp": in_all(DIVERGED),
    "full_mask_in_short_warp": in_all(DIVERGED),
    "mask_names_lane_that_returned": in_all(DIVERGED),
    "missing_barrier": {"plain": "wrong result", "race": f"{RACE.format('shared')}|nobody wrote"},
    "missing_barrier_after_merge": {"plain": "wrong result", "race": RACE.format("shared")},
    "missing_barrier_before_reuse": {"plain": "wrong result", "race": RACE.format("shared")},
    "missing_syncwarp": {"race": RACE.format("shared")},
    "shared_memory_nobody_wrote": {"plain": "is -?nan", "race": "read of shared memory that nobody wrote"},
    "plain_store_read_by_another_block": {"race": RACE.format("global")},
    "two_blocks_write_one_word": {"race": RACE.format("global")},
    "plain_beside_atomic": {"race": RACE.format("global")},
    "copy_not_waited_for": {"plain": "is -?nan", "race": "nobody wrote"},
    "cluster_barrier_in_both_branches": in_all("the cluster diverged: cluster_sync at planted.cu"),
    "return_before_cluster_barrier": in_all(
        "deadlock: 1 thread.s. returned .first: block .1, 0, 0. thread 5.; 63 thread.s. wait at cluster_sync"
    ),
    "block_barrier_while_cluster_waits": in_all("32 thread.s. wait at cluster_sync at planted.cu"),
    "peer_may_not_have_started": in_all("which may not have started: no barrier of the cluster precedes"),
    "missing_cluster_barrier": {"plain": "is -?nan", "race": f"{RACE.format('shared')}|nobody wrote"},
    "read_before_peer_has_written": {"plain": "is -?nan", "race": f"{RACE.format('shared')}|nobody wrote"},
    "peer_may_have_returned": in_all("of which threads have returned"),
    "peer_returns_without_barrier": in_all("no barrier of the cluster follows"),
    "block_barrier_for_cluster_barrier": {"race": f"{RACE.format('shared')}|nobody wrote"},
    "one_place_for_every_turn": {"plain": "wrong result", "race": RACE.format("shared")},
    "rank_that_no_peer_has": in_all("rank 2 of a cluster of 2 blocks"),
    "address_that_is_not_shared": in_all("by an address that is not in this block's"),
    "two_blocks_of_a_cluster_write_one_word": {"race": RACE.format("global")},
    "overrun_of_tail": {"asan": "heap-buffer-overflow"},
    "forgotten_unaligned_head": in_all("misaligned"),
    "overrun_of_static_shared": {"asan": "out of bounds|heap-buffer-overflow"},
    "overrun_of_dynamic_shared": {"asan": "heap-buffer-overflow"},
    "target_out_of_range": {"asan": "heap-buffer-overflow"},
    "index_past_2_to_31": {"plain": "wrong result", "asan": "signed integer overflow"},
}


def run(mode: str, name: str, *arguments: str, schedule: int = 0) -> tuple[int, str]:
    # a program that is linked with AddressSanitizer needs no preloaded one
    env = {k: v for k, v in build.environment(mode, schedule).items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        [str(build.program(mode, name)), *arguments], env=env, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", build.MODES)
def test_what_kernels_may_use(mode, schedule):
    status, output = run(mode, "features", schedule=schedule)
    assert (status, output) == (0, "passed\n")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", build.MODES)
def test_correct_twins_pass(mode, schedule):
    status, output = run(mode, "planted", "all", "good", schedule=schedule)
    assert status == 0, output
    assert output.count("passed") == len(MUST_FIND)


def test_every_planted_mistake_is_expected_by_some_build():
    _, listed = run("plain", "planted", "list")
    assert listed.split() == list(MUST_FIND)


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        pytest.param(name, mode, words, id=f"{name}-{mode}")
        for name, modes in MUST_FIND.items()
        for mode, words in modes.items()
    ],
)
def test_planted_mistake_is_found(name, mode, words):
    outputs = []
    for schedule in SCHEDULES:
        status, output = run(mode, "planted", name, "bad", schedule=schedule)
        if status and re.search(words, output):
            return
        outputs.append(output)
    pytest.fail(f"no schedule showed {words!r}:\n" + "\n".join(outputs))
