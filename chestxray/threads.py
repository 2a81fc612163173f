"""Batches of files worked on by threads, which an error ends only when all of them are idle.

Threads, not processes: Pillow lets go of Python's lock while it decodes, resizes and encodes, and threads start at once
and need no second copy of anything. It knows nothing of what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import joblib

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Batch], Result], batches: Iterable[Batch], workers: int, ordered: bool = True
) -> Iterator[Result]:
    """What `work` gives for each batch, as it is done.

    Args:
        work: called with a batch, in a thread.
        batches: taken as threads become free.
        workers: threads; -1 takes all cores.
        ordered: give the results in the order of the batches; else whichever is done first.

    Raises:
        Exception: the first error of `work`. No batch is begun after it, and those that had begun are done: joblib
            itself would tell of it while other threads are still writing.
    """
    failed: list[Exception] = []

    def attempt(batch: Batch) -> Result | None:
        if not failed:
            try:
                return work(batch)
            except Exception as error:
                failed.append(error)
        return None

    order = "generator" if ordered else "generator_unordered"
    parallel = joblib.Parallel(n_jobs=workers, prefer="threads", return_as=order)
    for result in parallel(joblib.delayed(attempt)(batch) for batch in batches):
        if not failed:
            yield result
    if failed:
        raise failed[0]
