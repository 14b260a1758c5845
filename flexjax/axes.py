"""Dimension letters and logical axis names, defined once.

Letters stand in jaxtyping shapes everywhere: `B` sequences, `T` forward rows of a step, `W` rows of
a backward tile or tokens of a window, `S` KV tokens, `N` query heads, `K` KV heads, `H` head dim,
`D` model dim, `F` MLP dim, `V` vocabulary, `L` layers, `A` adapter slots, `R` maximum LoRA rank,
`P` pages, `Z` page size, `M` pages per sequence.

Logical axes name what a dimension of a long-lived array means. Placing the arrays on a device mesh
is one table from these names to mesh axes; on one device every entry is None.
"""

VOCAB = "vocab"
EMBED = "embed"
MLP = "mlp"
Q_HEADS = "q_heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
LAYERS = "layers"
ADAPTERS = "adapters"
RANK = "rank"
PAGES = "pages"
PAGE = "page"

PADDING = -1
"""Padding value of every integer array."""
