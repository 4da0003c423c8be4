"""What every process of a test run does."""
from __future__ import annotations

import gc
import signal


def pytest_configure() -> None:
    """A run that a shell started in the background ignores Ctrl-C, which some tests press."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Each compilation ends with a collection of garbage, which need not go through all the tests."""
    gc.collect()
    gc.freeze()
