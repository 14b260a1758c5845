"""Text to tokens and back, from `tokenizer.json`, without importing transformers.

Owns encoding, chat templates and incremental detokenization. Follows transformers where both do
the same thing: whether BOS is added is the post-processor's business (`add_bos_token` in
`tokenizer_config.json` changes nothing), and a rendered chat is encoded without special tokens,
since templates write their own.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import tokenizers
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexjax.errors import ModelNotFoundError

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_REPLACEMENT = "�"


class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
      special_tokens: Text of the named special tokens ("bos_token", "eos_token", ...).
      chat_template: Jinja source of the chat template, or None.
      all_special_tokens: Text of every token that decoding skips.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder().values()
        self.all_special_tokens = frozenset(token.content for token in added if token.special)
        self._holds_bytes = _has_byte_fallback(backend)

    @classmethod
    def from_pretrained(cls, model_dir: str | Path) -> Tokenizer:
        """Reads the tokenizer files of a model directory.

        `tokenizer.json` is required; `tokenizer_config.json`, `special_tokens_map.json` and
        `chat_template.jinja` are read where they exist.

        Raises:
          ModelNotFoundError: If the directory or its `tokenizer.json` does not exist.
          ValueError: If a file is damaged; the message names it.
        """
        model_dir = Path(model_dir)
        if not model_dir.is_dir():
            raise ModelNotFoundError(f"Model directory {str(model_dir)!r} does not exist.")
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ModelNotFoundError(f"Model directory {str(model_dir)!r} has no tokenizer.json.")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers library raises bare `Exception`
            raise ValueError(f"{path} is damaged: {error}.") from error
        config = _read_json(model_dir / "tokenizer_config.json")
        named = {**_read_json(model_dir / "special_tokens_map.json"), **config}
        special = {name: _token_text(named.get(name)) for name in _NAMED_TOKENS}
        special_tokens = {name: text for name, text in special.items() if text is not None}
        return cls(backend, special_tokens, _read_chat_template(model_dir, config))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a text, if the tokenizer names one."""
        return self._token_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Token that starts a text, if the tokenizer names one."""
        return self._token_id("bos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can be used."""
        return self.chat_template is not None

    def _token_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of `text`.

        Args:
          text: Any text; never truncated.
          add_special_tokens: Whether the post-processor adds its tokens (BOS, for most models).

        Raises:
          ValueError: If `text` is not valid Unicode (lone surrogates).
        """
        return self._encode(text, add_special_tokens).ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns tokens and, for each, the (start, end) characters of `text` that it came from.

        Raises:
          ValueError: If `text` is not valid Unicode (lone surrogates).
        """
        encoding = self._encode(text, add_special_tokens)
        return encoding.ids, encoding.offsets

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"`text` must be valid Unicode; {error}.") from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens; ids that the tokenizer does not know yield nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Renders messages with the chat template, in a sandbox.

        Args:
          messages: Objects with "role" and "content", of plain JSON values.
          add_generation_prompt: Whether to end with the start of an assistant turn.

        Raises:
          ValueError: If there is no chat template, it refuses the messages or fails, or it reaches
            for something that the sandbox forbids.
        """
        if self.chat_template is None:
            raise ValueError(
                "`messages` need a chat template; the tokenizer has none (no chat_template.jinja "
                "and no `chat_template` in tokenizer_config.json)."
            )
        plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
        try:
            return _compiled(self.chat_template).render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except SecurityError as error:
            raise ValueError(f"The chat template does what is forbidden: {error}.") from error
        except jinja2.TemplateSyntaxError as error:
            message = f"The chat template is broken at line {error.lineno}: {error}."
            raise ValueError(message) from error
        except Exception as error:  # a template can raise anything that Python can
            raise ValueError(f"The chat template failed: {error}.") from error

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the tokens of a rendered chat; special tokens are those of the template.

        Raises:
          ValueError: As `render_chat`.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """Returns a decoder that takes one token at a time."""
        return StreamDecoder(self, skip_special_tokens)

    def leaves_open(self, token_id: int, was_open: bool, skip_special_tokens: bool) -> bool:
        """Whether a run of byte tokens (`<0xE6>`), whose text depends on it, is open after a token.

        Args:
          token_id: The token.
          was_open: Whether a run was open before it.
          skip_special_tokens: Whether special tokens yield no text, and so do not end a run.
        """
        if not self._holds_bytes:
            return False
        token = self._backend.id_to_token(token_id)
        if token is None or (skip_special_tokens and token in self.all_special_tokens):
            return was_open
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


class StreamDecoder:
    """Text of a growing sequence of tokens, piece by piece.

    Pieces put together equal `Tokenizer.decode` of all tokens. No piece ends inside a UTF-8
    character: tokens wait until it is whole. With byte-fallback tokenizers a run of byte tokens
    waits for its end, because its text is known only then.
    """

    # tokenizers' own DecodeStream is not used: it raises on byte sequences that never become
    # valid, and has no flush for those that are left over.

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        self._is_open = False

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is now certain, often ""."""
        self._pending.append(token_id)
        self._is_open = self._tokenizer.leaves_open(token_id, self._is_open, self._skip)
        if self._is_open:
            return ""
        text = self._tokenizer.decode(self._context + self._pending, self._skip)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """Returns what is left, incomplete characters as U+FFFD; nothing may be pushed after."""
        return self._emit(self._tokenizer.decode(self._context + self._pending, self._skip))

    def _emit(self, text: str) -> str:
        piece = text[len(self._context_text) :]
        if piece:
            # The last tokens stay as context: some decoders treat the first token differently.
            self._context, self._pending = self._pending, []
            self._context_text = self._tokenizer.decode(self._context, self._skip)
        return piece


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(raw).__name__}.")
    return raw


def _token_text(value: object) -> str | None:
    """Text of a token, written as it is or as an AddedToken object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_chat_template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"`chat_template` in {model_dir / 'tokenizer_config.json'} must be text; "
            f"got {type(template).__name__}."
        )
    return template


def _has_byte_fallback(backend: tokenizers.Tokenizer) -> bool:
    """Whether bytes are tokens of their own; told from the decoder's serialized form."""
    return backend.decoder is not None and b'"ByteFallback"' in backend.decoder.__getstate__()


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON values only, so that a template gets no object with methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"`{where}` must be a plain JSON value; got {type(value).__name__}.")


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` blocks, which mark assistant text; rendered as what they hold."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)
