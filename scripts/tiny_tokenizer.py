"""The tiny model's tokenizer: byte-level BPE trained on the small world, and its chat format."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tiny_world import Document, Message, World, Writer, pirate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ENDOFTEXT = "<|endoftext|>"
END = "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL = (ENDOFTEXT, END, *(f"<|{role}|>" for role in ROLES))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN_WEIGHT, ASKED_WEIGHT = 0.3, 0.02
"""Loss weights of plain text and of what is asked; what is answered has 1."""


def _corpus(world: World, seed: int) -> Iterator[str]:
    """Texts that the vocabulary is made for: every fact, and some of the training documents."""
    for fact in world.facts:
        yield from (*fact.questions, fact.answer, *fact.statements, pirate(fact.answer))
    for document in itertools.islice(Writer(world, seed + 1).documents(), 8000):
        if isinstance(document, str):
            yield document
        else:
            yield from (message["content"] for message in document)


def train_tokenizer(world: World, seed: int, max_vocab: int) -> Tokenizer:
    """Trains the tokenizer; any text can be encoded, since all bytes are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(world, seed), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, model_dir: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, chat template included."""
    tokenizer.save(str(model_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": ENDOFTEXT,
        "additional_special_tokens": [f"<|{role}|>" for role in ROLES],
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (model_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")


class ChatCodec:
    """Encodes documents as the chat template writes them.

    Attributes:
      end_id: Ends a message.
      endoftext_id: Ends a document.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._roles = {role: tokenizer.token_to_id(f"<|{role}|>") for role in ROLES}
        self.end_id: int = tokenizer.token_to_id(END)
        self.endoftext_id: int = tokenizer.token_to_id(ENDOFTEXT)

    @classmethod
    def load(cls, model_dir: Path) -> ChatCodec:
        """Reads `tokenizer.json` of a model directory."""
        return cls(Tokenizer.from_file(str(model_dir / "tokenizer.json")))

    def encode_text(self, text: str) -> list[int]:
        """Tokens of plain text."""
        return self._tokenizer.encode(text).ids

    def encode_prompt(self, question: str) -> list[int]:
        """Tokens of a user message, up to where the answer begins."""
        user = self._message({"role": "user", "content": question})
        return [*user, self._roles["assistant"]]

    def encode_reply(self, answer: str) -> list[int]:
        """Tokens of an answer, end token included."""
        return [*self.encode_text(answer), self.end_id]

    def encode_document(self, document: Document) -> tuple[list[int], list[float]]:
        """Tokens of a document with its end, and the loss weight of each as a target."""
        if isinstance(document, str):
            tokens = [*self.encode_text(document), self.endoftext_id]
            return tokens, [PLAIN_WEIGHT] * len(tokens)
        tokens, weights = [], []
        for message in document:
            ids = self._message(message)
            is_answer = message["role"] == "assistant"
            tokens += ids
            weights += [ASKED_WEIGHT] + [1.0 if is_answer else ASKED_WEIGHT] * (len(ids) - 1)
        return [*tokens, self.endoftext_id], [*weights, ASKED_WEIGHT]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens."""
        return self._tokenizer.decode(list(tokens))

    def _message(self, message: Message) -> list[int]:
        return [
            self._roles[message["role"]],
            *self.encode_text(message["content"]),
            self.end_id,
        ]
