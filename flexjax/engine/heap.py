"""Keeps Python's garbage collector from stalling every request at once."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.RLock()  # a collection may end a context that was left behind
_num_inside = 0


@contextlib.contextmanager
def settled_heap() -> Iterator[None]:
    """Hides what is alive from the garbage collector for as long as the context lasts.

    A full collection visits every object of the process, those of jax and the tokenizer included:
    a quarter of a second on a slow core, in which no request gets a token. One is made on entry;
    those that come later visit only what is newer. Contexts may overlap, in any threads: the first
    to begin collects and freezes, the last to end gives all objects back, as `gc.unfreeze` does,
    those included that the process had frozen itself.
    """
    global _num_inside
    with _lock:
        if not _num_inside:
            gc.collect()
            gc.freeze()
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if not _num_inside:
                gc.unfreeze()
