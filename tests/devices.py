"""The devices on which tests of the language run."""
from __future__ import annotations

import pytest

DEVICES = [pytest.param("reference", marks=pytest.mark.reference), pytest.param("cpu", marks=pytest.mark.cpu)]
