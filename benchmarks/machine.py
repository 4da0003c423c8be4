"""What a benchmark ran on: the processor, its caches, versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    try:
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()


def describe(threads: int, peers: dict[str, str]) -> dict[str, Any]:
    """Everything that belongs beside a number, as plain data; `peers`: the versions of other engines."""
    from graphflow.compiler.target import host_target

    target = host_target()
    names = ("graphflow", "numpy", "llvmlite")
    return {
        "date": str(datetime.date.today()),
        "cpu": processor(),
        "processors": os.cpu_count(),
        "threads": threads,
        "vector_bits": 8 * target.vector_bytes,
        "caches": {"L1": target.l1, "L2": target.l2, "L3": target.l3},
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
            **{{"torch": "PyTorch", "jax": "JAX"}[name]: version for name, version in peers.items()},
        },
    }


def text(found: dict[str, Any]) -> str:
    """The description as a sentence, load and all."""
    caches = ", ".join(f"{name} {_size(size)}" for name, size in found["caches"].items() if size)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['date']}, {found['cpu']} with {found['processors']} processors ({found['vector_bits']}-bit "
        f"vectors; {caches}), {found['system']}, {found['threads']} threads, load {found['load']:.1f} at the "
        f"start, {versions}"
    )


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
