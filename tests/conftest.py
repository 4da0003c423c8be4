"""What every process of a test run does."""
from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Each compilation ends with a collection of garbage, which need not go through all the tests."""
    gc.collect()
    gc.freeze()
