"""Which adapter, and which version of it, lives in which slot of the bank."""

from __future__ import annotations

import dataclasses

from flexjax.config import LoraConfig
from flexjax.errors import AdapterNotFoundError, CapacityError


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter as callers see it.

    Attributes:
      name: Name that requests give.
      version: Optimizer steps behind the weights that are served; 0 if loaded from a directory.
      lora: Shape and scale.
      is_training: Whether a job is training it.
    """

    name: str
    version: int
    lora: LoraConfig
    is_training: bool = False


class AdapterSlots:
    """Slots of the bank, names and versions.

    A request holds the slot that its name meant when it began; a slot is handed out again only
    when no name points to it and nobody holds it.
    """

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._holders = [0] * num_slots
        self._named: dict[str, tuple[int, AdapterInfo]] = {}
        self._reserved: set[int] = set()

    def names(self) -> list[str]:
        """Names in the order in which they were first loaded."""
        return list(self._named)

    def info(self, name: str) -> AdapterInfo:
        """Describes an adapter.

        Raises:
          AdapterNotFoundError: If there is none of that name.
        """
        return self._lookup(name)[1]

    def slot_of(self, name: str) -> int:
        """Slot that new requests for `name` read.

        Raises:
          AdapterNotFoundError: If there is none of that name.
        """
        return self._lookup(name)[0]

    def _lookup(self, name: str) -> tuple[int, AdapterInfo]:
        if name not in self._named:
            known = ", ".join(self._named) or "none"
            raise AdapterNotFoundError(f"`adapter` must be loaded; got {name!r}, loaded: {known}.")
        return self._named[name]

    def try_reserve(self) -> int | None:
        """Takes a free slot for weights that have no name yet, or None."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._reserved.add(slot)
        return slot

    def reserve(self) -> int:
        """Takes a free slot.

        Raises:
          CapacityError: If every slot is in use.
        """
        slot = self.try_reserve()
        if slot is None:
            raise CapacityError(
                f"`max_adapters` slots are all in use; got {self.num_slots}. Unload an adapter, "
                "wait for requests to finish, or start the engine with more."
            )
        return slot

    def release(self, slot: int) -> None:
        """Gives a reserved slot back."""
        self._reserved.remove(slot)
        self._recycle(slot)

    def publish(self, slot: int, info: AdapterInfo) -> None:
        """Makes a reserved slot what `info.name` means; requests in flight keep what they had."""
        self._reserved.remove(slot)
        previous = self._named.get(info.name)
        self._named[info.name] = (slot, info)
        if previous is not None:
            self._recycle(previous[0])

    def update_info(self, info: AdapterInfo) -> None:
        """Replaces the description of a loaded adapter."""
        self._named[info.name] = (self.slot_of(info.name), info)

    def unload(self, name: str) -> None:
        """Forgets a name; its slot is free when its last request ends.

        Raises:
          AdapterNotFoundError: If there is none of that name.
        """
        slot = self.slot_of(name)
        del self._named[name]
        self._recycle(slot)

    def hold(self, slot: int) -> None:
        """Counts one more request that reads `slot`; -1 (the base model) is nobody's."""
        if slot >= 0:
            self._holders[slot] += 1

    def drop(self, slot: int) -> None:
        """Counts one less."""
        if slot >= 0:
            self._holders[slot] -= 1
            self._recycle(slot)

    def _recycle(self, slot: int) -> None:
        is_named = any(slot == used for used, _ in self._named.values())
        is_held = self._holders[slot] > 0
        if not is_named and not is_held and slot not in self._reserved and slot not in self._free:
            self._free.append(slot)

    def check_integrity(self) -> None:
        """Asserts that free, named, reserved and held slots fit together."""
        named = [slot for slot, _ in self._named.values()]
        assert len(set(named)) == len(named)
        assert min(self._holders) >= 0
        for slot in range(self.num_slots):
            in_use = slot in named or slot in self._reserved or self._holders[slot] > 0
            assert in_use == (slot not in self._free)
