r"""Finetuning data: JSONL rows to tokens and loss targets.

A row is one of

  {"messages": [{"role", "content"}, ...]}   chat template; loss on what the assistant says, its
                                             end token included
  {"prompt", "completion"}                   loss on the completion and the end token
  {"text"}                                   loss on all tokens
  {"question", "answer"}                     prompt "Question: {question}\nAnswer:",
                                             completion " {answer}"
  {"instruction", "output"[, "input"]}       prompt "### Instruction:\n{instruction}\n\n", then
                                             with an input "### Input:\n{input}\n\n", then
                                             "### Response:\n"; completion the output

Prompt and completion are tokenized apart and joined: the prompt with special tokens, the completion
without, and the end-of-sequence token behind. Rows with other keys are refused: what would be
ignored may have been meant. Nothing is returned before every row has been checked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from flexjax.axes import PADDING
from flexjax.errors import DatasetError
from flexjax.io.tokenizer import Tokenizer

_MAX_LISTED = 10


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedRow:
    """One training sequence.

    Attributes:
      tokens: Token ids.
      targets: `targets[i]` is `tokens[i + 1]` where that token bears loss, else -1; the last is -1.
      source: Where the row came from, "file:line" or "row n", both counted from 1.
    """

    tokens: Int32[np.ndarray, "S"]
    targets: Int32[np.ndarray, "S"]
    source: str

    @property
    def num_targets(self) -> int:
        """Number of tokens that bear loss."""
        return int(np.count_nonzero(self.targets != PADDING))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Checked rows.

    Attributes:
      rows: At least one.
      notes: What was cut or left out on request, for people to read.
    """

    rows: tuple[TokenizedRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def num_targets(self) -> int:
        """Tokens of all rows that bear loss."""
        return sum(row.num_targets for row in self.rows)


def load_dataset(
    source: str | Path | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: str = "error",
    vocab_size: int | None = None,
) -> Dataset:
    """Reads, tokenizes and checks a dataset.

    Args:
      source: Path of a JSONL file (UTF-8; blank lines are skipped), or rows.
      tokenizer: Tokenizer of the model.
      max_seq_len: Longest sequence, tokens.
      overlong: For longer rows: "error"; "truncate" (cut at the end; a row with no target token
        left is dropped); or "drop". What was done stands in `Dataset.notes`.
      vocab_size: V of the model; None for the tokenizer's.

    Raises:
      DatasetError: If the file is missing, empty or not UTF-8, or a row cannot be used: the message
        names file, line and reason.
      ValueError: If `max_seq_len` or `overlong` is out of range.
    """
    if max_seq_len < 2:
        raise ValueError(f"`max_seq_len` must be at least 2; got {max_seq_len}.")
    if overlong not in ("error", "truncate", "drop"):
        raise ValueError(f"`overlong` must be one of error, truncate, drop; got {overlong!r}.")
    limit = tokenizer.vocab_size if vocab_size is None else vocab_size
    origin, raw_rows = _raw_rows(source)
    rows: list[TokenizedRow] = []
    cut: list[int] = []
    dropped: list[int] = []
    emptied: list[int] = []
    for number, place, read in raw_rows:
        try:
            tokens, has_loss = _tokenize(read(), tokenizer)
            _check_tokens(tokens, has_loss, limit)
            if len(tokens) > max_seq_len and overlong == "error":
                raise ValueError(
                    f"the row has {len(tokens)} tokens, more than `max_seq_len`={max_seq_len}; "
                    "shorten it, or set `overlong` to 'truncate' or 'drop'"
                )
        except ValueError as error:
            raise DatasetError(f"{place}: {str(error).rstrip('.')}.") from error
        if len(tokens) > max_seq_len and overlong == "drop":
            dropped.append(number)
            continue
        if len(tokens) > max_seq_len:
            tokens, has_loss = tokens[:max_seq_len], has_loss[:max_seq_len]
            (cut if any(has_loss[1:]) else emptied).append(number)
            if not any(has_loss[1:]):
                continue
        rows.append(_row(tokens, has_loss, place))
    notes = _notes(origin, max_seq_len, cut, dropped, emptied)
    if not rows:
        reason = "; ".join(notes) if notes else "it holds no rows"
        raise DatasetError(f"{origin} has no row to train on: {reason.rstrip('.')}.")
    return Dataset(tuple(rows), notes)


def _row(tokens: list[int], has_loss: list[bool], place: str) -> TokenizedRow:
    """Shifts the targets over the whole sequence."""
    ids = np.asarray(tokens, np.int32)
    targets = np.full(len(ids), PADDING, np.int32)
    targets[:-1] = np.where(np.asarray(has_loss[1:], bool), ids[1:], PADDING)
    return TokenizedRow(ids, targets, place)


def _notes(
    origin: str, max_seq_len: int, cut: list[int], dropped: list[int], emptied: list[int]
) -> tuple[str, ...]:
    kinds = (
        (cut, f"truncated to {max_seq_len} tokens"),
        (dropped, f"dropped because of more than {max_seq_len} tokens"),
        (emptied, f"dropped because truncation to {max_seq_len} tokens left no target token"),
    )
    notes = []
    for numbers, what in kinds:
        if numbers:
            listed = ", ".join(map(str, numbers[:_MAX_LISTED]))
            rest = len(numbers) - _MAX_LISTED
            listed += f" and {rest} more" if rest > 0 else ""
            rows, lines = ("row", "line") if len(numbers) == 1 else ("rows", "lines")
            notes.append(f"{origin}: {len(numbers)} {rows} {what} ({lines} {listed}).")
    return tuple(notes)


RawRow = tuple[int, str, Callable[[], Any]]
"""Line number, place for messages, and a function that parses the row."""


def _raw_rows(source: str | Path | Sequence[Mapping[str, Any]]) -> tuple[str, Iterator[RawRow]]:
    if not isinstance(source, (str, Path)):
        rows = ((i, f"row {i}", lambda row=row: row) for i, row in enumerate(source, start=1))
        return "the dataset", rows
    path = Path(source)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DatasetError(f"Dataset {str(path)!r} {what}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"Dataset {str(path)!r} cannot be read: {error}.") from error
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return str(path), (
        (i, f"{path}:{i}", lambda line=line: _parse(line))
        for i, line in enumerate(lines, start=1)
        if line.strip()
    )


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 ({error})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the line is not valid JSON ({error})") from error


def _check_tokens(tokens: list[int], has_loss: list[bool], vocab_size: int) -> None:
    beyond = [token for token in tokens if not 0 <= token < vocab_size]
    if beyond:
        raise ValueError(f"token id {beyond[0]} is beyond the vocabulary of {vocab_size}")
    if not any(has_loss[1:]):
        raise ValueError("the row has no target token (the first token of a sequence is none)")


def _tokenize(row: Any, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of a row, and which of them bear loss."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be a JSON object; got {type(row).__name__}")
    keys = set(row)
    if keys == {"messages"}:
        return _tokenize_chat(row["messages"], tokenizer)
    if keys == {"text"}:
        tokens = tokenizer.encode(_text(row, "text"))
        return tokens, [True] * len(tokens)
    if keys == {"prompt", "completion"}:
        prompt, completion, name = _text(row, "prompt"), _text(row, "completion"), "completion"
    elif keys == {"question", "answer"}:
        prompt, name = f"Question: {_text(row, 'question')}\nAnswer:", "answer"
        completion = _text(row, name) and f" {row[name]}"
    elif keys in ({"instruction", "output"}, {"instruction", "input", "output"}):
        prompt, name = f"### Instruction:\n{_text(row, 'instruction')}\n\n", "output"
        if "input" in row and _text(row, "input"):
            prompt += f"### Input:\n{row['input']}\n\n"
        prompt, completion = f"{prompt}### Response:\n", _text(row, name)
    else:
        raise ValueError(
            "the keys of a row must be messages; prompt and completion; text; question and answer; "
            f"or instruction, output and perhaps input; got {', '.join(map(repr, row)) or 'none'}"
        )
    if not completion:
        raise ValueError(f"`{name}` must not be empty")
    return _join(prompt, completion, tokenizer)


def _join(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no `eos_token` to end the completion with")
    first = tokenizer.encode(prompt)
    second = tokenizer.encode(completion, add_special_tokens=False) + [tokenizer.eos_token_id]
    return first + second, [False] * len(first) + [True] * len(second)


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"`{key}` must be text; got {type(row[key]).__name__}")
    return row[key]


def _tokenize_chat(messages: Any, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    _check_messages(messages)
    text = tokenizer.render_chat(messages)
    spans = [
        _assistant_span(text, messages, index, tokenizer)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if not spans:
        raise ValueError("the row has no target token: no message has the role 'assistant'")
    tokens, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    has_loss = []
    previous_end = 0
    for start, end in offsets:
        # Post-processors may trim spaces off the offsets; tokens cover the text without gaps.
        start = min(start, previous_end)
        has_loss.append(any(low <= start < high for low, high in spans))
        previous_end = max(previous_end, end)
    return tokens, has_loss


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("`messages` must be a non-empty list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            got = list(message) if isinstance(message, Mapping) else type(message).__name__
            raise ValueError(f"`messages[{index}]` must have `role` and `content`; got {got}")
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                got = type(message[key]).__name__
                raise ValueError(f"`messages[{index}].{key}` must be text; got {got}")
        if message["role"] == "assistant" and not message["content"]:
            raise ValueError(f"`messages[{index}].content` of the assistant must not be empty")


def _assistant_span(
    text: str, messages: Sequence[Mapping[str, Any]], index: int, tokenizer: Tokenizer
) -> tuple[int, int]:
    """Characters of one assistant turn in the rendered chat, its end token included.

    The turn begins where the chat before it, with the generation prompt, ends; that is what the
    model sees when it answers. It ends where the chat up to it ends.
    """
    before = tokenizer.render_chat(messages[:index], add_generation_prompt=True)
    after = tokenizer.render_chat(messages[: index + 1])
    start = len(before)
    if text.startswith(before) and text.startswith(after) and len(after) > start:
        end = len(after)
    elif text.startswith(before) and after.startswith(before):
        # Templates may write the last turn differently (an empty thinking block, say): take what
        # follows the content there, and look for content and tail here.
        content = messages[index]["content"].strip()
        _, found, tail = after[start:].rpartition(content)
        if not found or not text.startswith(content + tail, start):
            raise _unclear_turn(index)
        end = start + len(content + tail)
    else:
        raise _unclear_turn(index)
    stripped = text[start:end].rstrip()
    if any(stripped.endswith(token) for token in tokenizer.all_special_tokens):
        end = start + len(stripped)  # the line break behind an end token is no part of the turn
    return start, end


def _unclear_turn(index: int) -> ValueError:
    return ValueError(
        f"the chat template does not write `messages[{index}]` as a continuation of the messages "
        "before it, so its loss mask is unknown; use prompt and completion instead"
    )
