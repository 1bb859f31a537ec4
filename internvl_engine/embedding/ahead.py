"""Work of threads, a bounded number of items ahead of whoever takes the results."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_threads() -> int:
    """Threads that decode images: as many as processors that this process may use, 8 at most."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, allowed or 1)


def map_ahead(
    function: Callable[[int, Item], Result],
    items: Iterator[Item],
    ahead: Callable[[], int],
    workers: int,
) -> Generator[Result, None, None]:
    """function(number, item) of every item in order, computed by threads before it is asked for.

    The items are read in the thread that takes the results, one for each result that it takes, so
    that an endless iterator is never read further than the results taken and those ahead. What
    `function` or the iterator raises comes in its place, after the results before it. Closed early,
    it starts nothing more and waits for what is running.

    Args:
        function: called in threads, several at a time.
        items: may be endless.
        ahead: how many items to have in work beside the one that is waited for, asked every time.
        workers: threads.
    """
    waiting: deque[Future[Result]] = deque()
    numbered = enumerate(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")

    def top_up() -> None:
        nonlocal numbered
        try:
            for number, item in islice(numbered, max(ahead() + 1 - len(waiting), 0)):
                waiting.append(pool.submit(function, number, item))
        except Exception as error:  # noqa: BLE001  of the iterator: raised in its place
            failed: Future[Any] = Future()
            failed.set_exception(error)
            waiting.append(failed)
            numbered = iter(())  # type: ignore[assignment]

    try:
        top_up()
        while waiting:
            yield waiting.popleft().result()
            top_up()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
