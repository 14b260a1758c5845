"""Pages and adapter slots: who owns what."""

import numpy as np
import pytest

from flexjax.config import LoraConfig
from flexjax.errors import AdapterNotFoundError, CapacityError
from flexjax.scheduler.adapter_slots import AdapterInfo, AdapterSlots
from flexjax.scheduler.page_allocator import PageAllocator


def test_pages_are_handed_out_once(rng):
    pages, owned = PageAllocator(23, 4), []
    for _ in range(500):
        if owned and rng.random() < 0.5:
            pages.free(owned.pop(int(rng.integers(len(owned)))))
        else:
            count = int(rng.integers(0, 9))
            got = pages.allocate(count)
            assert (got is None) == (count > 23 - sum(map(len, owned)))
            if got is not None:
                assert len(got) == count
                owned.append(got)
        flat = [page for part in owned for page in part]
        assert len(set(flat)) == len(flat) and pages.num_free == 23 - len(flat)
        assert all(0 <= page < 23 for page in flat)
        pages.check_integrity()


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_for(tokens, count):
    assert PageAllocator(9, 4).pages_for(tokens) == count


def test_freeing_what_is_not_owned_raises():
    pages = PageAllocator(4, 4)
    (page,) = pages.allocate(1)
    pages.free([page])
    for wrong in (page, 3, 99):
        with pytest.raises(KeyError):
            pages.free([wrong])
    pages.check_integrity()


def info(name, version=0):
    return AdapterInfo(name, version, LoraConfig(r=2))


def load(slots, name, version=0):
    slot = slots.reserve()
    slots.publish(slot, info(name, version))
    slots.check_integrity()
    return slot


def test_a_held_slot_outlives_its_name():
    slots = AdapterSlots(2)
    slot = load(slots, "a")
    slots.hold(slot)
    slots.hold(slot)
    slots.unload("a")
    assert slots.reserve() != slot and slots.try_reserve() is None
    slots.drop(slot)
    assert slots.try_reserve() is None
    slots.drop(slot)
    assert slots.try_reserve() == slot
    slots.check_integrity()


def test_publishing_switches_the_name_and_keeps_what_is_held():
    slots = AdapterSlots(3)
    old = load(slots, "a", 1)
    slots.hold(old)
    new = load(slots, "a", 2)
    assert slots.slot_of("a") == new != old and slots.info("a").version == 2
    third = slots.reserve()
    assert third not in (old, new)
    slots.release(third)
    slots.drop(old)
    assert {slots.reserve(), slots.reserve()} == {old, third}
    slots.check_integrity()


def test_messages():
    slots = AdapterSlots(1)
    load(slots, "only")
    with pytest.raises(CapacityError, match="`max_adapters` slots are all in use; got 1"):
        slots.reserve()
    for call in (slots.slot_of, slots.info, slots.unload):
        with pytest.raises(AdapterNotFoundError, match="got 'x', loaded: only"):
            call("x")
    slots.hold(-1)
    slots.drop(-1)
    slots.check_integrity()


def test_random_life_of_slots():
    rng = np.random.default_rng(0)
    slots, reserved, held = AdapterSlots(5), [], []
    for _ in range(2_000):
        action = rng.integers(6)
        names = slots.names()
        if action == 0 and (slot := slots.try_reserve()) is not None:
            reserved.append(slot)
        elif action == 1 and reserved:
            slots.publish(reserved.pop(), info(f"n{rng.integers(4)}"))
        elif action == 2 and reserved:
            slots.release(reserved.pop())
        elif action == 3 and names:
            held.append(slots.slot_of(names[rng.integers(len(names))]))
            slots.hold(held[-1])
        elif action == 4 and held:
            slots.drop(held.pop(int(rng.integers(len(held)))))
        elif action == 5 and names:
            slots.unload(names[rng.integers(len(names))])
        slots.check_integrity()
        assert not set(reserved) & (set(held) | {slots.slot_of(n) for n in slots.names()})
