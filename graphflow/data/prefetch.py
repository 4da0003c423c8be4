"""Worker threads that make batches while a training step runs."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from graphflow.data.sets import Batch

if TYPE_CHECKING:
    from concurrent.futures import Future

Job = TypeVar("Job")


def prefetched(make: Callable[[Job], Batch], jobs: Iterable[Job], workers: int) -> Iterator[Batch]:
    """``make(job)`` for each job, in order, made by so many threads at most two batches each ahead of use.

    An error in a worker comes out here, with the worker's traceback. The threads end with the iterator:
    when it is exhausted, closed, or raises.
    """
    if not workers:
        yield from map(make, jobs)
        return
    from concurrent.futures import ThreadPoolExecutor
    left = iter(jobs)
    pool = ThreadPoolExecutor(workers, "graphflow-data")
    try:
        waiting: deque[Future[Batch]] = deque(pool.submit(make, job) for job in islice(left, 2 * workers))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(make, job) for job in islice(left, 1))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
