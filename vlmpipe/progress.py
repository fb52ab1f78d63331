"""What the terminal shows of anything longer than a few seconds; the flow reads the same lines."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int | None, label: str, every_s: float = 5.0) -> Iterator[Item]:
    """Pass `items` through and say how far they are: a bar on a terminal, a line every few seconds elsewhere.

    The lines read `label: 120/3000 (4%) 60.1/s`, which the flow turns into a live artifact.
    """
    if sys.stderr.isatty():
        from rich.progress import track

        yield from track(items, description=label, total=total, transient=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every_s or done == total:
            share = f"/{total} ({100 * done // total}%)" if total else ""
            print(f"{label}: {done}{share} {done / max(now - start, 1e-9):.1f}/s", file=sys.stderr, flush=True)
            last = now


@contextmanager
def shown_while(show: Callable[[bool], None], every_s: float = 5.0) -> Iterator[None]:
    """Call `show(False)` every `every_s` seconds while the block runs, from a thread, and `show(True)` at its end."""
    finished = threading.Event()

    def view() -> None:
        while not finished.wait(every_s):
            show(False)
        show(True)

    viewer = threading.Thread(target=view, daemon=True)
    viewer.start()
    try:
        yield
    finally:
        finished.set()
        viewer.join()
