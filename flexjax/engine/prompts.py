"""Prompts in their three forms: text, token ids, chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexjax.io.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages."""


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Turns a prompt into token ids.

    Raises:
      ValueError: If it is empty, holds an unknown token, or is text without a tokenizer.
    """
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if (isinstance(prompt, str) or is_chat) and tokenizer is None:
        raise ValueError("`prompt` must be token ids; this model has no tokenizer.")
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt) if prompt else []  # type: ignore[union-attr]
    elif is_chat:
        tokens = tokenizer.encode_chat(prompt, add_generation_prompt=True)  # type: ignore
    else:
        tokens = [_token_id(value, vocab_size) for value in prompt]
    if not tokens:
        raise ValueError("`prompt` must hold at least one token; got an empty one.")
    return tokens


def _token_id(value: Any, vocab_size: int) -> int:
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or not 0 <= value < vocab_size:
        raise ValueError(
            f"`prompt` token ids must be integers in [0, {vocab_size}); got {value!r}."
        )
    return int(value)


def is_list(value: Any) -> bool:
    """Whether this is a list of values rather than one."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt: text, token ids, or chat messages."""
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], (int, np.integer, Mapping))
