"""Runs Python with PyCUDA over the simulated GPU of `fake_cuda`."""
from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("fake_cuda")
MISSING = ("there is no PyCUDA" if importlib.util.find_spec("pycuda") is None else
           "there is no g++ on the PATH" if shutil.which("g++") is None else "")
"""Why it cannot be done here, or ""."""


def install(folder: Path) -> dict[str, str]:
    """Builds the driver and puts the stand-in for nvcc into the folder; the environment that uses both."""
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1",
                    str(FOLDER / "driver.cpp"), "-o", str(folder / "libcuda.so.1"), "-ldl"], check=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FOLDER / "nvcc.py"}" "$@"\n')
    nvcc.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "GRAPHFLOW_CACHE": str(folder / "cache"),
            "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def run(code: str, environment: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own; `more`: what the simulated GPU shall do wrong."""
    return subprocess.run([sys.executable, "-c", code], env={**environment, **more}, capture_output=True,
                          text=True, cwd=Path(__file__).parent, timeout=600)
