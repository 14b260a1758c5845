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
        first = len(self._free) - count
        pages = self._free[first:]
        pages.reverse()  # the page that was freed last comes first
        del self._free[first:]
        self._used.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Takes pages back."""
        pages = list(pages)
        num_left = len(self._used) - len(pages)
        self._used.difference_update(pages)
        if len(self._used) != num_left:
            raise KeyError(f"`pages` must be owned, and given once; got {pages}.")
        self._free += pages

    def check_integrity(self) -> None:
        """Asserts that every page is either free or owned, once."""
        assert len(self._free) + len(self._used) == self.num_pages
        assert len(set(self._free)) == len(self._free)
        assert not self._used.intersection(self._free)
