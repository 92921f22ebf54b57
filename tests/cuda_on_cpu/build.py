"""Builds the CUDA kernels as C++, with the shim in the place of the GPU, into `build/simt/<mode>/`.

plain   optimised; finds diverged barriers, wrong masks, deadlocks, wrong results
asan    AddressSanitizer and UndefinedBehaviorSanitizer: overruns, misalignment, overflow
race    data races among CUDA threads, reads of shared memory that nobody wrote

The last two are compiled for float32 and bfloat16 alone, which halves the time that it takes.

Each mode gets `libfastloss_simt.so`, the operators and kernels of the package registered for CPU tensors in
the namespace `fastloss_simt`, and the programs `planted` and `features`, which test the shim itself. Needs
g++ and the toolkit's headers, but neither nvcc nor a GPU. `python build.py [MODE...]` builds; `load(mode)`
builds and loads.
"""

from __future__ import annotations

import fcntl
import functools
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODES = ("plain", "asan", "race")
NAMESPACE = "fastloss_simt"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "simt"

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # torch 2.11, as in setup.py
COMMON = "-std=c++20 -fPIC -fvisibility=hidden -g1 -DFL_SIMT"
KERNELS = "-DFL_DEVICE_MATH"  # see csrc/math/math.h
WARNINGS = "-Wall -Wno-unknown-pragmas -Wno-attributes -Wno-psabi"
# AddressSanitizer reports accesses to null and beyond an object itself.
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=undefined"
TWO_DTYPES = "-DFL_TWO_DTYPES"  # see csrc/math/dtype.h
OTHER_DTYPES = ("classification_float16", "classification_float64")
# mode: flags of the shim and the kernels, flags of the kernels alone, flags of the linker
FLAGS = {
    "plain": ("-O1", "", ""),
    "asan": (f"-O1 -fno-omit-frame-pointer {SANITIZE}", TWO_DTYPES, SANITIZE),
    # simt_race.cpp is the runtime of -fsanitize=thread: not linked with it
    "race": ("-O1 -DSIMT_RACE", f"-fsanitize=thread {TWO_DTYPES}", ""),
}


class BuildError(RuntimeError):
    pass


def find_compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler.split()[0]):
        raise BuildError(
            f"cannot build the CUDA kernels for the CPU: no C++ compiler {compiler!r}; install g++"
        )
    return compiler


def _toolkits() -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home, "include")
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        top = re.search(r"TOP=(\S+)", dry.stderr)  # nvcc may be a wrapper: it knows where it is
        yield Path(top[1] if top else Path(nvcc).resolve().parents[1], "include")
    yield Path("/usr/local/cuda/include")
    for path in sys.path:
        yield from sorted(Path(path).glob("nvidia/cu[0-9]*/include"), reverse=True)


@functools.cache
def cuda_includes() -> tuple[Path, ...]:
    """Where the toolkit's headers are: CUDA_HOME, next to nvcc, or in pip packages."""
    for include in _toolkits():
        places = (include, include / "cccl")
        needed = ("cuda_runtime.h", "crt/host_config.h", "cuda_bf16.h", "nv/target")
        if all(any((p / header).is_file() for p in places) for header in needed):
            return places
    raise BuildError(
        "cannot build the CUDA kernels for the CPU: no headers of the CUDA toolkit were found; install the "
        "toolkit and set CUDA_HOME, or pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


def _near(path: Path | str) -> str:
    """Relative to where ninja runs: a copied or moved checkout stays built."""
    return os.path.relpath(path, OUT)


def _write_ninja() -> None:
    import torch
    from ninja.ninja_syntax import Writer
    from torch.utils.cpp_extension import include_paths

    text = io.StringIO()
    n = Writer(text, width=110)
    cxx = find_compiler()
    includes = " ".join(
        [*(f"-I{_near(p)}" for p in (CSRC, CSRC / "cuda", HERE)), *(f"-isystem {p}" for p in cuda_includes())]
    )
    n.rule(
        "cxx",
        f"{cxx} -MMD -MF $out.d {COMMON} {WARNINGS} {includes} $flags -x c++ -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="g++ $out",
    )
    n.rule("link", f"{cxx} -o $out $in $flags -ldl", description="link $out")

    def objects(folder: str, sources: list[Path], flags: str) -> list[str]:
        made = []
        for source in sources:
            made.append(f"{folder}/{source.name}.o")
            n.build(made[-1], "cxx", _near(source), variables={"flags": flags})
        return made

    torch_flags = " ".join([STABLE_ABI, *(f"-isystem {_near(p)}" for p in include_paths())])
    operators = objects(
        "operators",
        [*sorted((CSRC / "ops").glob("*.cpp")), CSRC / "cpu" / "dispatch.cpp", CSRC / "cpu" / "pool.cpp"],
        f"-O1 -DFASTLOSS_NAMESPACE={NAMESPACE} {torch_flags}",
    )
    torch_libraries = (
        f"-L{_near(Path(torch.__file__).parent / 'lib')} -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10"
    )
    for mode in MODES:
        shim_flags, kernel_flags, link_flags = FLAGS[mode]
        runtime = [p for p in sorted(HERE.glob("simt*.cpp")) if mode == "race" or p.stem != "simt_race"]
        shim = objects(mode, runtime, shim_flags)
        sources = sorted((CSRC / "cuda").rglob("*.cu"))
        if TWO_DTYPES in kernel_flags:
            sources = [p for p in sources if p.stem not in OTHER_DTYPES]
        kernels = objects(mode, sources, f"{KERNELS} {shim_flags} {kernel_flags}")
        library, programs = f"{mode}/libfastloss_simt.so", []
        n.build(
            library,
            "link",
            [*operators, *kernels, *shim],
            variables={"flags": f"-shared -Wl,-Bsymbolic,-z,defs {link_flags} {torch_libraries}"},
        )
        for program in ("planted", "features"):
            own = objects(mode, [HERE / f"{program}.cu"], f"{KERNELS} {shim_flags} {kernel_flags}")
            programs += n.build(f"{mode}/{program}", "link", [*own, *shim], variables={"flags": link_flags})
        n.build(f"{mode}-programs", "phony", programs)
        n.build(mode, "phony", [library, f"{mode}-programs"])
    file = OUT / "build.ninja"
    if not file.exists() or file.read_text() != text.getvalue():
        file.write_text(text.getvalue())


@functools.cache
def build(*targets: str) -> None:
    """Brings modes, or `<mode>-programs`, up to date. Processes that build at the same time take turns."""
    from ninja import BIN_DIR

    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write_ninja()
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        made = subprocess.run(
            [str(Path(BIN_DIR, "ninja")), *jobs, *targets], cwd=OUT, text=True, capture_output=True
        )
    if made.returncode:
        raise BuildError(f"building {', '.join(targets)} failed:\n{made.stdout}{made.stderr}")


def program(mode: str, name: str) -> Path:
    build(f"{mode}-programs")
    return OUT / mode / name


@functools.cache
def load(mode: str) -> str:
    """Builds and loads the operators of one mode; gives their namespace. A process can load one mode only.

    `asan` needs a process that was started with `environment("asan")`.
    """
    import torch

    from fastloss._ops import chunked_linear

    from .products import RowByRow

    build(mode)
    torch.ops.load_library(str(OUT / mode / "libfastloss_simt.so"))
    chunked_linear.PRODUCTS[NAMESPACE, "cpu"] = RowByRow
    return NAMESPACE


def environment(mode: str, schedule: int = 0) -> dict[str, str]:
    """Environment of a process that runs kernels in this mode."""
    env = {**os.environ, "SIMT_ORDER": str(schedule)}
    if mode == "asan":
        runtimes = [
            subprocess.check_output([*find_compiler().split(), f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        env |= {
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    return env


if __name__ == "__main__":
    try:
        build(*(sys.argv[1:] or MODES))
    except BuildError as error:
        sys.exit(f"error: {error}")
