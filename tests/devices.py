"""The devices that tests of the language run on: the GPU too, if one is usable or `fake_gpu.py` is one."""
from __future__ import annotations

import os

import pytest

from graphflow.compiler.plan.errors import DeviceError
from graphflow.runtime.device import device

FAKE = "GRAPHFLOW_FAKE_GPU" in os.environ
"""Whether the GPU is the simulated one, which takes seconds for what a GPU does in microseconds."""


def _why_no_gpu() -> str:
    try:
        device("cuda")
    except DeviceError as error:
        return str(error)
    return ""


NO_GPU = _why_no_gpu()
"""Why programs cannot run on a GPU here, or ""."""
REFERENCE = pytest.param("reference", marks=pytest.mark.reference)
CPU = pytest.param("cpu", marks=pytest.mark.cpu)
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = [REFERENCE, CPU] if NO_GPU else [REFERENCE, CPU, CUDA]
