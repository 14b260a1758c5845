"""Metadata of ragged attention."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Int

Ref = Any
"""A Pallas reference to an array in the GPU's memory."""


class PageList(NamedTuple):
    """The pages that a group of rows may read, as one flat list.

    A segment is one sequence. Entries past `num_pages` are -1 and are never read.

    Attributes:
      pages: Page indices in the pool, -1 padding.
      segments: Segment that each page belongs to.
      starts: Position in its sequence of each page's first token.
      num_pages: Entries in use, scalar.
    """

    pages: Int[Array, "M"]
    segments: Int[Array, "M"]
    starts: Int[Array, "M"]
    num_pages: Int[Array, ""]
