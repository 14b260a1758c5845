"""Who owns which page. Host arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """A free list of pages.

    Shortage is a return value, not an error; freeing a page twice, or one that was never handed
    out, is a bug and raises.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one sequence need."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """Hands out `count` pages, or None if there are fewer."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Takes pages back."""
        for page in pages:
            self._used.remove(page)
            self._free.append(page)

    def check_integrity(self) -> None:
        """Asserts that every page is either free or owned, once."""
        assert len(self._free) + len(self._used) == self.num_pages
        assert len(set(self._free)) == len(self._free)
        assert not self._used.intersection(self._free)
