"""Runs Python with PyCUDA over the simulated GPU of `fake_cuda`.

    python tests/fake_gpu.py [--keep FOLDER] COMMAND ARGUMENTS …

runs a command on it, such as `pytest tests/test_cuda_nets.py`: FOLDER keeps the driver and the compiled code.
"""
from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).with_name("fake_cuda")
MISSING = ("there is no PyCUDA" if importlib.util.find_spec("pycuda") is None else
           "there is no g++ on the PATH" if shutil.which("g++") is None else "")
"""Why it cannot be done here, or ""."""


def install(folder: Path) -> dict[str, str]:
    """Builds the driver and puts stand-ins for nvcc and compute-sanitizer (it just runs its command) into the
    folder; the environment that uses them."""
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1",
                    str(FOLDER / "driver.cpp"), "-o", str(folder / "libcuda.so.1"), "-ldl"], check=True)
    for name, text in (("nvcc", f'exec "{sys.executable}" "{FOLDER / "nvcc.py"}" "$@"'),
                       ("compute-sanitizer", 'while [ "${1#--}" != "$1" ]; do shift 2; done\nexec "$@"')):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "GRAPHFLOW_CACHE": str(folder / "cache"),
            "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "GRAPHFLOW_FAKE_GPU": "1"}


def run(code: str, environment: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own; `more`: what the simulated GPU shall do wrong."""
    return subprocess.run([sys.executable, "-c", code], env={**environment, **more}, capture_output=True,
                          text=True, cwd=Path(__file__).parent, timeout=600)


def main(arguments: list[str]) -> int:
    """Runs a command; its exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments[:1] == ["--keep"]:
            folder, arguments = Path(arguments[1]).absolute(), arguments[2:]
            folder.mkdir(parents=True, exist_ok=True)
        if MISSING or not arguments:
            print(MISSING or __doc__, file=sys.stderr)
            return 2
        return subprocess.run(arguments, env=install(folder)).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
