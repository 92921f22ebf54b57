"""Build two libraries into the package with ninja, incrementally.

`_library.so`   the operators and kernels, on torch's stable ABI: one build serves every torch >= 2.11 and Python
`_C.*.so`   pybind11, for this Python: what was built, what the machine has

CUDA kernels are compiled whenever nvcc is found, also with a CPU-only torch; they include no torch header.
Environment: FASTLOSS_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST (default "8.0;9.0+PTX"), CXX, MAX_JOBS.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # torch 2.11
INSTRUCTION_SETS = {"sse2": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
TILES = "x86-64-v4 -mamx-tile -mamx-bf16 -mavx512bf16"  # for matrix products alone


def stop(message: str):
    sys.exit(f"fastloss: {message}")


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler or not shutil.which(compiler.split()[0]):
        stop("a C++20 compiler is needed to build; install g++ (for example apt-get install g++) or set CXX")
    return compiler


def find_nvcc() -> str | None:
    given = os.environ.get("FASTLOSS_CUDA") or "auto"
    wish = given.lower()
    if wish not in ("auto", "0", "1"):
        stop(f"FASTLOSS_CUDA: expected one of auto, 0, 1, got {given!r}")
    if wish == "0":
        return None
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if not nvcc and home:
            nvcc = shutil.which("nvcc", path=str(Path(home, "bin")))
    if not nvcc and wish == "1":
        stop("FASTLOSS_CUDA=1, but there is no nvcc on PATH nor in CUDA_HOME; install the CUDA toolkit")
    return nvcc


def cuda_root(nvcc: str) -> Path:
    """Return the toolkit of an nvcc, as nvcc itself reports it: it may be a wrapper."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"TOP=(\S+)", dry)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def arch_list() -> list[str]:
    return re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").strip())


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", arch)
        if not match:
            stop(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0+PTX, got {arch!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaBuild(build_ext):
    def build_extensions(self):
        try:
            import torch
            from torch.utils.cpp_extension import include_paths
        except ImportError:
            stop(
                "torch is needed to build; install it first (pip install torch), then run pip install "
                "--no-build-isolation ."
            )
        import pybind11
        from ninja import BIN_DIR
        from ninja.ninja_syntax import Writer

        cxx, nvcc = find_compiler(), find_nvcc()
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{'cuda' if nvcc else 'cpu'}"
        build.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        n = Writer(text, width=110)
        common = "-O3 -std=c++20 -fPIC -fvisibility=hidden -Wall -Wno-psabi"
        n.rule(
            "cxx",
            f"{cxx} -MMD -MF $out.d {common} $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="g++ $out",
        )
        n.rule("link", f"{cxx} -shared -o $out $in $flags -Wl,--exclude-libs,ALL", description="link $out")

        def near(path: str | Path) -> str:
            """Relative to the build folder: a copied or moved checkout stays built."""
            return os.path.relpath(path, build)

        def compile_(source: str, flags: str, name: str | None = None) -> str:
            out = f"{name or source.replace('/', '_')}.o"
            n.build(out, "cxx", near(CSRC / source), variables={"flags": flags})
            return out

        stable = " ".join([STABLE_ABI, *(f"-isystem {near(p)}" for p in include_paths())])
        cuda = "-DFASTLOSS_CUDA" if nvcc else ""
        objects = [
            compile_(f"ops/{p.name}", f"{stable} {cuda}") for p in sorted((CSRC / "ops").glob("*.cpp"))
        ]
        objects += [compile_(f"cpu/{p.name}", "") for p in sorted((CSRC / "cpu").glob("*.cpp"))]
        for source in sorted((CSRC / "cpu" / "kernels").glob("*.cpp")):
            tiles = {"amx": TILES} if source.name == "linear.cpp" else {}
            for isa, march in (INSTRUCTION_SETS | tiles).items():
                # immintrin.h of g++ 12 trips -Wuninitialized when its intrinsics are inlined
                flags = f"-march={march} -DFL_ISA={isa} -Wno-uninitialized -Wno-maybe-uninitialized"
                objects.append(compile_(f"cpu/kernels/{source.name}", flags, f"cpu_{source.stem}_{isa}"))

        link = ""
        facts = []
        if nvcc:
            archs = arch_list()
            version = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[
                1
            ]
            # By itself nvcc compresses only some files. The smaller format needs a driver that every user of CUDA 13
            # has, and not every one of CUDA 12.
            smallest = int(version.split(".")[0]) >= 13
            compression = "-compress-mode=size" if smallest else "-Xfatbin=-compress-all"
            n.rule(
                "nvcc",
                f"{nvcc} -MMD -MF $out.d -O3 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden "
                f"-Xptxas -v {compression} {' '.join(gencode(archs))} -c $in -o $out > $out.log 2>&1 "
                "|| (cat $out.log; false)",
                depfile="$out.d",
                deps="gcc",
                description="nvcc $out",
            )
            for source in sorted((CSRC / "cuda").rglob("*.cu")):
                n.build(f"cuda_{source.stem}.o", "nvcc", near(source))
                objects.append(f"cuda_{source.stem}.o")
            libraries = next(d for d in (cuda_root(nvcc) / "lib64", cuda_root(nvcc) / "lib") if d.is_dir())
            link = f"-L{libraries} -lcudart_static -ldl -lrt -lpthread"
            facts = [f"-DFASTLOSS_CUDA_ARCHS='\"{';'.join(archs)}\"'", f"-DFASTLOSS_NVCC='\"{version}\"'"]
        torch_lib = Path(torch.__file__).parent / "lib"
        n.build(
            "_library.so",
            "link",
            objects,
            variables={"flags": f"{link} -L{near(torch_lib)} -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10"},
        )
        python = f"-isystem {sysconfig.get_path('include')} -isystem {near(pybind11.get_include())}"
        module = compile_("module.cpp", " ".join([python, cuda, *facts]))
        n.build("_C.so", "link", [module, "_library.so"], variables={"flags": "-Wl,-rpath,'$$ORIGIN'"})
        (build / "build.ninja").write_text(text.getvalue())
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([str(Path(BIN_DIR, "ninja")), *jobs], cwd=build).returncode:
            stop("the build failed; the compiler's message is above")
        for extension, built in zip(self.extensions, ("_library.so", "_C.so"), strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(build / built, target)

    def get_ext_filename(self, fullname):
        if fullname.endswith("_library"):  # not a Python module: no Python version in its name
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)


setup(
    ext_modules=[Extension("fastloss._library", []), Extension("fastloss._C", [])],
    cmdclass={"build_ext": NinjaBuild},
)
