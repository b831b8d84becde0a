"""Where a number was measured: machine, versions, settings, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch

import relu_ext

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FALLBACK_CACHE = 32 * 2**20  # bytes


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def caches() -> dict[str, int]:
    """Bytes of each data cache that core 0 can use, by level."""
    sizes = {}
    for index in sorted(CACHES.glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            sizes[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return sizes


def last_level_cache() -> int:
    known = list(caches().values())
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        if name in os.sysconf_names:
            known.append(os.sysconf(name))
    return max(known, default=0) or FALLBACK_CACHE


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_model() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def huge_pages() -> str | None:
    """The mode in brackets: always, madvise or never."""
    modes = _read(HUGE_PAGES)
    return modes[modes.index("[") + 1 : modes.index("]")] if modes and "[" in modes else None


# What glibc reads when a process starts; other allocators do not look at it.
TUNABLES = {
    # By default the end of the heap goes back to the system, and whether a tensor of megabytes then costs page faults
    # hangs on the order in which others were freed: one competitor may pay in every round and the next in none.
    "glibc.malloc.trim_threshold": 2**31 - 1,
    "glibc.malloc.mmap_threshold": 32 * 2**20,
    # posix_memalign cuts off what is beyond the alignment, and these two lists keep such pieces apart: a block that is
    # freed does not fit the next request of its size, so tensors wander through more memory than the caches hold.
    "glibc.malloc.tcache_count": 0,
    "glibc.malloc.mxfast": 0,
}


def restart_with_steady_malloc() -> None:
    """Starts this program anew where GLIBC_TUNABLES is not set, with a malloc that gives the same blocks in each round
    to each competitor."""
    if "GLIBC_TUNABLES" not in os.environ:
        settings = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": settings})


def commit() -> str | None:
    """The checked-out commit, with a mark where the sources differ from it; results and pictures do not count."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = [*git, "status", "--porcelain", "--", ":/", ":(exclude)results"]
        changes = subprocess.run(status, capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + (" with local changes" if changes.stdout.strip() else "")


def file_name(device: torch.device) -> str:
    """ "cpu", or the GPU's name in small letters with hyphens."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def gpu_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None


class OtherLoad:
    """The share of the machine's CPU time that other processes took since this was made: they disturb the numbers."""

    def __init__(self) -> None:
        self.start = self._seconds()

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        fields = (_read(Path("/proc/stat")) or "").split("\n", 1)[0].split()
        if len(fields) < 9:
            return None
        user, nice, system, _idle, _wait, irq, soft_irq, steal = (int(field) for field in fields[1:9])
        busy = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.monotonic()

    def share(self) -> float | None:
        end = self._seconds()
        if self.start is None or end is None:
            return None
        busy, own, elapsed = (b - a for a, b in zip(self.start, end, strict=True))
        return max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1))


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    machine = {
        "cpu": cpu_model(),
        "logical_cpus": os.cpu_count(),
        "caches_bytes": caches(),
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_bytes": properties.total_memory,
            "gpu_multiprocessors": properties.multi_processor_count,
            "gpu_l2_bytes": properties.L2_cache_size,
            "gpu_driver": gpu_driver(),
        }
    return {
        "device": device.type,
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "relu_ext": relu_ext.build_info(),
            "commit": commit(),
        },
        "settings": {
            "threads": threads,
            "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE"),
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"),
            "RELU_EXT_ISA": os.environ.get("RELU_EXT_ISA"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "transparent_hugepage": huge_pages(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
    }


def summary(about: dict[str, Any]) -> str:
    """One line for a table's title or the foot of a picture."""
    machine, versions, settings = about["machine"], about["versions"], about["settings"]
    torch_version, revision = versions["torch"], (versions["commit"] or "none")[:10]
    if about["device"] == "cuda":
        driver = f"driver {machine['gpu_driver'] or 'unknown'}"
        return f"{machine['gpu']}; torch {torch_version}; CUDA {versions['torch_cuda']}, {driver}; commit {revision}"
    where = f"{machine['cpu']}, {machine['logical_cpus']} CPUs, {settings['threads']} threads"
    pages = f"THP_MEM_ALLOC_ENABLE={settings['THP_MEM_ALLOC_ENABLE'] or 'unset'}"
    isa = versions["relu_ext"]["isa"]
    return f"{where}; instruction set {isa}, torch {torch_version}; {pages}; commit {revision}"
