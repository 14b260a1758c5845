"""The garbage collector leaves alone what was alive before a context, and nothing else."""

import gc
import threading
import weakref

from flexjax.engine.heap import settled_heap
from flexjax.engine.loop import EngineLoop


class Node:
    """Refers to itself, so that only the garbage collector frees it."""

    def __init__(self):
        self.me = self
        self.others = [{} for _ in range(1000)]


def test_what_is_alive_is_not_visited():
    node = Node()
    with settled_heap():
        visited = gc.get_objects()
        assert len(visited) < 1000
        assert not any(found is node for found in visited)
        inner = weakref.ref(Node())
        gc.collect()
        assert inner() is None, "newer objects are collected as ever"
    assert any(found is node for found in gc.get_objects())


def test_what_becomes_garbage_meanwhile_is_freed_at_the_end():
    node = Node()
    alive = weakref.ref(node)
    with settled_heap(), settled_heap():
        del node
        gc.collect()
        assert alive() is not None
    gc.collect()
    assert alive() is None


def test_contexts_may_overlap():
    node = Node()
    alive = weakref.ref(node)
    first, second = settled_heap(), settled_heap()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    del node
    gc.collect()
    assert alive() is not None, "the second has not ended"
    second.__exit__(None, None, None)
    gc.collect()
    assert alive() is None


def test_errors_end_a_context():
    frozen = gc.get_freeze_count()
    try:
        with settled_heap():
            assert gc.get_freeze_count() > frozen
            raise KeyError("x")
    except KeyError:
        pass
    assert gc.get_freeze_count() <= frozen


class Loop(EngineLoop):
    """Counts what is frozen while it runs."""

    def __init__(self):
        super().__init__()
        self.frozen, self.ran = 0, threading.Event()

    def _step(self):
        self.frozen = gc.get_freeze_count()
        self.ran.set()
        return False

    def _tell_dead(self, error):
        raise AssertionError(error)


def test_a_running_loop_settles_the_heap():
    before = gc.get_freeze_count()
    with Loop() as loop:
        assert loop.ran.wait(10)
    assert loop.frozen > before + 1000
    assert gc.get_freeze_count() <= before
