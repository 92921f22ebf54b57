"""Show build and hardware info, and which kernels a tensor will use."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

NO_GPU = "none can exist: torch sees no GPU"
DRIVERS = {12: 525, 13: 580}
"""The oldest NVIDIA driver by the major version of CUDA."""


def cpu_model() -> str:
    """Return the processor's name; Linux keeps it in /proc/cpuinfo."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """Return name, compute capability and memory of the GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_GiB": round(p.total_memory / 2**30, 1)}
        for p in found
    ]


def cuda_of_driver() -> str | None:
    """Return the newest CUDA version that the NVIDIA driver supports, or None where there is no driver."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def driver_is_too_old(nvcc: str | None, driver: str | None) -> str | None:
    """Return a sentence if the CUDA runtime of an nvcc, linked statically, cannot run on the driver.

    A runtime runs on the drivers of its own major version, also of an older minor one, and on newer drivers.
    """
    if not nvcc or not driver or int(driver.split(".")[0]) >= int(nvcc.split(".")[0]):
        return None
    major = int(nvcc.split(".")[0])
    needed = f"CUDA {major}" + (f" ({DRIVERS[major]} or newer)" if major in DRIVERS else "")
    return (
        f"an error: built with nvcc {nvcc}, whose runtime needs a driver for {needed}, but the driver is for CUDA "
        f"{driver}; install a newer driver, or rebuild with an nvcc of CUDA {driver.split('.')[0]}"
    )


def extension() -> Any | None:
    """Return the compiled module, or None where it was not built."""
    try:
        return importlib.import_module("fastloss._C")
    except ImportError:
        return None


def machine() -> dict[str, Any]:
    """Return the facts that a measurement on this machine depends on."""
    compiled = extension()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels_for": compiled.cpu_capability() if compiled else None,
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_cuda": torch.version.cuda,
        "driver_cuda": cuda_of_driver(),
        "python": platform.python_version(),
        "system": platform.system(),
        "gpus": gpus(),
    }


def will_use(built: dict[str, Any] | None, here: dict[str, Any]) -> dict[str, str]:
    """Say by device which kernels a tensor will use."""
    if built is None:
        unknown = "fastloss kernels; which ones is unknown, fastloss._C not being built for this Python"
        return {"cpu tensors": unknown, "cuda tensors": unknown if here["gpus"] else NO_GPU}
    cpu = f"{here['kernels_for']} kernels, {here['threads']} threads"
    too_old = driver_is_too_old(built.get("nvcc"), here["driver_cuda"])
    if too_old:
        cuda = too_old
    elif not here["gpus"]:
        cuda = NO_GPU
    elif built.get("cuda"):
        cuda = "CUDA kernels"
    else:
        cuda = "an error: this build has no CUDA kernels, so rebuild where nvcc is found"
    return {"cpu tensors": cpu, "cuda tensors": cuda}


def gather() -> dict[str, Any]:
    """Return all facts by section."""
    compiled, here = extension(), machine()
    built = dict(compiled.build_info()) if compiled else None
    facts: dict[str, Any] = {
        "built": built if built is not None else {"fastloss._C": False},
        "this machine": here,
        "will be used for": will_use(built, here),
    }
    if compiled and here["gpus"]:
        facts["CUDA kernels"] = [dict(kernel) for kernel in compiled.cuda_kernels()]
    if compiled:
        facts["memory pool"] = dict(importlib.import_module("fastloss.memory").stats())
    return facts


def text_of(value: Any) -> str:
    """Format one fact as one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{k} {text_of(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(text_of, value)) if value else "none"
    return str(value)


def main(args: argparse.Namespace) -> int:
    """Run `python -m fastloss info`: print plain text, so that it works without the extras."""
    facts = gather()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for section, content in facts.items():
        print(section)
        lines = content if isinstance(content, dict) else {k.pop("name"): k for k in content}
        width = max(map(len, lines), default=0)
        for key, value in lines.items():
            print(f"  {key.replace('_', ' '):{width}}  {text_of(value)}")
    return 0
