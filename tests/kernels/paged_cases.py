"""Random paged pools and naive dense attention, for the tests of this directory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PageList


class Paged:
    """Sequences whose keys and values lie in shuffled pages of a pool.

    Everything that no page table names, and the tails of last pages, is NaN.
    """

    def __init__(self, rng, lengths, *, page_size, num_kv_heads, head_dim, num_layers=2, layer=1):
        self.lengths, self.page_size, self.layer = list(lengths), page_size, layer
        counts = [-(-n // page_size) for n in lengths]
        num_pages = sum(counts) + 3
        order = [int(page) for page in rng.permutation(num_pages)]
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self.k_pool, self.v_pool = np.full((2, *shape), np.nan, np.float32)
        self.pages, self.keys, self.values = [], [], []
        for length, count in zip(lengths, counts, strict=True):
            pages = [order.pop() for _ in range(count)]
            k, v = rng.standard_normal((2, length, num_kv_heads, head_dim)).astype(np.float32)
            for position in range(length):
                page, offset = pages[position // page_size], position % page_size
                self.k_pool[layer, page, offset] = k[position]
                self.v_pool[layer, page, offset] = v[position]
            self.pages.append(pages)
            self.keys.append(k)
            self.values.append(v)
        self.num_pages = num_pages

    @property
    def pools(self):
        """Keys, values and the layer to read."""
        return jnp.asarray(self.k_pool), jnp.asarray(self.v_pool), jnp.int32(self.layer)

    def page_list(self, rng, padding=3):
        """The flat list in random order of sequences, with padding behind."""
        entries = []
        for segment in rng.permutation(len(self.pages)):
            for index, page in enumerate(self.pages[segment]):
                entries.append((page, int(segment), index * self.page_size))
        used = len(entries)
        entries += [(-1, -1, -1)] * padding
        columns = [jnp.asarray(column, jnp.int32) for column in zip(*entries, strict=True)]
        return PageList(*columns, jnp.int32(used))


@functools.partial(jax.jit, static_argnames=("sm_scale", "sliding_window"))
def dense_attention(q, k, v, sm_scale, sliding_window, positions):
    """Plain softmax attention of query rows at `positions` of one sequence, [t, N, H]."""
    repeats = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, repeats, axis=1), jnp.repeat(v, repeats, axis=1)
    scores = jnp.einsum("tnh,snh->nts", q, k) * sm_scale
    gap = jnp.asarray(positions)[:, None] - jnp.arange(k.shape[0])[None, :]
    mask = gap >= 0
    if sliding_window is not None:
        mask &= gap < sliding_window
    scores = jnp.where(mask[None], scores, -jnp.inf)
    out = jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores, axis=-1), v)
    return out, jax.nn.logsumexp(scores, axis=-1).T


def scale_of(head_dim):
    """The usual scale, 1 / sqrt(H)."""
    return 1.0 / math.sqrt(head_dim)
