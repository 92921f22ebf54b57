"""test_kernels.py again, under AddressSanitizer and UndefinedBehaviorSanitizer and under the race checker."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from . import build


@pytest.mark.parametrize("mode", ["asan", "race"])
def test_kernels_in_a_process_of_their_own(mode):
    build.build(mode)
    env = build.environment(mode) | {"FASTLOSS_SIMT_MODE": mode, "OMP_NUM_THREADS": "1"}
    tests = str(build.HERE / "test_kernels.py")
    # -s: a sanitizer ends the process with its report on stderr, which pytest would otherwise hold back
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-v", "-x", "-p", "no:cacheprovider", tests],
        env=env,
        cwd=build.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-20000:]
    summary = done.stdout.splitlines()[-1]
    assert re.search(r"\b[1-9]\d* passed", summary) and "skipped" not in summary, summary
