"""LoRA adapters under PEFT: greedy generation in batches, and training, in their best form.

A batch is left-padded, prefilled and decoded with the KV cache on; a row leaves the batch with its
last token. How requests and training share the model is `peft_serving`'s. Needs torch, transformers
and peft (the `oracle` extra).
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from transformers.cache_utils import DynamicCache

from flexjax.config import FinetuneConfig
from flexjax.io.dataset import TokenizedRow
from flexjax.metrics import StepRecord, TrainRecord

FORMS = ("merged", "separate", "mixed")
"""How a batch gets its adapter: one adapter a batch, merged into the base for as long as it is
used, or beside the base; or several adapters in a batch (`adapter_names` of PEFT)."""


@dataclasses.dataclass(frozen=True)
class DecodePass:
    """What one forward pass generated.

    Attributes:
      rows: Rows of the batch that got a token.
      tokens: The token of each.
    """

    rows: Sequence[int]
    tokens: Sequence[int]


class PeftModel:
    """One base model under PEFT with all adapters, those in training too; float32.

    Attributes:
      generate_threads: torch's threads while it generates.
      train_threads: torch's threads while it trains.
    """

    def __init__(self, model_dir: str | Path, adapters: Mapping[str, str | Path]):
        self.generate_threads = self.train_threads = torch.get_num_threads()
        transformers.utils.logging.disable_progress_bar()
        base = transformers.AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=torch.float32, attn_implementation="sdpa"
        )
        (first, path), *others = adapters.items()
        self._model = peft.PeftModel.from_pretrained(
            base, str(path), adapter_name=first, low_cpu_mem_usage=False
        )
        for name, path in others:
            self._model.load_adapter(str(path), name, low_cpu_mem_usage=False)
        self._model.eval()  # for training too: there is no dropout to turn on
        self._active: tuple[str, bool] | None = None
        self._merged: str | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        adapters: Sequence[str],
        form: str,
    ) -> Iterator[DecodePass]:
        """Generates greedily, end tokens or not, one pass at a time.

        Args:
          prompts: Token ids of each row.
          lengths: Tokens to generate for each row.
          adapters: Adapter of each row; one for all but with "mixed".
          form: One of `FORMS`.

        Raises:
          ValueError: If `form` is unknown, or several adapters meet in a form that holds one.
        """
        if form not in FORMS:
            raise ValueError(f"`form` must be one of {', '.join(FORMS)}; got {form!r}.")
        if form != "mixed" and len(set(adapters)) != 1:
            raise ValueError(
                f"`adapters` must be one for a batch that is {form!r}; got {sorted(set(adapters))}."
            )
        _use_threads(self.generate_threads)
        self._merge(adapters[0] if form == "merged" else None)
        if form == "separate":
            self._activate(adapters[0], is_trained=False)
        return self._passes(prompts, lengths, adapters if form == "mixed" else None)

    def _passes(
        self,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        names: Sequence[str] | None,
    ) -> Iterator[DecodePass]:
        tokens, mask = _left_padded(prompts)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        alive = list(range(len(prompts)))
        for done in itertools.count(1):
            options = {} if names is None else {"adapter_names": [names[row] for row in alive]}
            with torch.inference_mode():
                logits = self._model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                    **options,
                ).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)
            yield DecodePass(tuple(alive), tokens[:, 0].tolist())
            kept = [place for place, row in enumerate(alive) if lengths[row] > done]
            if not kept:
                return
            with torch.inference_mode():
                if len(kept) < len(alive):
                    index = torch.tensor(kept)
                    cache.batch_select_indices(index)
                    tokens, mask, positions = tokens[index], mask[index], positions[index]
                    alive = [alive[place] for place in kept]
                mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
                positions = positions[:, -1:] + 1

    def reset(self, adapter: str, path: str | Path) -> None:
        """Gives an adapter the values of a PEFT directory again."""
        self._merge(None)
        peft.set_peft_model_state_dict(
            self._model, peft.load_peft_weights(str(path)), adapter_name=adapter
        )

    def train(self, adapter: str) -> list[torch.nn.Parameter]:
        """Makes an adapter the one in training; returns its parameters."""
        _use_threads(self.train_threads)
        self._merge(None)
        self._activate(adapter, is_trained=True)
        return [p for p in self._model.parameters() if p.requires_grad]

    def loss_sum(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the losses of the adapter in training.

        Args:
          tokens: Token ids, int64 [B, S]; padding only behind a row's last token, so that no token
            sees it and no mask is needed.
          targets: Token that each position must predict, -1 where none counts, int64 [B, S].
        """
        logits = self._model(input_ids=tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
        )

    def _activate(self, adapter: str, *, is_trained: bool) -> None:
        if self._active != (adapter, is_trained):
            self._model.set_adapter(adapter, inference_mode=not is_trained)
            self._active = (adapter, is_trained)

    def _merge(self, adapter: str | None) -> None:
        """Merges an adapter, or none, and takes out what was merged before."""
        if self._merged != adapter:
            with torch.no_grad():
                if self._merged is not None:
                    self._model.unmerge_adapter()
                if adapter is not None:
                    self._model.merge_adapter([adapter])
            self._merged = adapter


def _use_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [B, S]."""
    longest = max(map(len, prompts))
    tokens = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


class PeftJob:
    """One adapter in training: rows in order and over again, AdamW, clipped gradients.

    Rows of a pass are padded to the longest. The loss is the mean over the target tokens of the
    whole batch, however many passes it takes.

    Attributes:
      config: What was asked for, as FlexJAX takes it; the learning rate is constant.
      records: Optimizer steps so far.
    """

    def __init__(
        self,
        model: PeftModel,
        config: FinetuneConfig,
        rows: Sequence[TokenizedRow],
        micro_batch: int,
    ):
        if len(rows) % config.batch_size or config.batch_size % micro_batch:
            raise ValueError(
                "`micro_batch` must divide `batch_size`, and that the number of rows; got "
                f"{micro_batch}, {config.batch_size} and {len(rows)}."
            )
        self.config = config
        self.records: list[TrainRecord] = []
        self._model = model
        self._rows = rows
        self._micro_batch = micro_batch
        self._next = 0
        self._loss = 0.0
        self._trained = model.train(config.adapter)
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def run_pass(self) -> StepRecord:
        """Does one forward and backward pass, and an optimizer step where a batch is complete."""
        begin_s = time.perf_counter()
        size, start = self.config.batch_size, self._next % len(self._rows)
        rows = self._rows[start : start + self._micro_batch]
        batch = self._rows[start - start % size :][:size]
        num_targets = sum(row.num_targets for row in batch)
        tokens, targets = _right_padded(rows)
        self._model.train(self.config.adapter)
        loss = self._model.loss_sum(tokens, targets) / num_targets
        loss.backward()
        self._loss += loss.item()
        self._next += self._micro_batch
        if self._next % size == 0:
            self._update(batch, num_targets)
        end_s = time.perf_counter()
        used, padded = sum(len(row.tokens) for row in rows), tokens.numel()
        return StepRecord(
            begin_s=begin_s,
            end_s=end_s,
            decode_rows=0,
            prefill_rows=0,
            forward_rows=used,
            backward_rows=used,
            decode_bucket=0,
            chunk_bucket=padded,
            window_bucket=padded,
            measured_ms=1e3 * (end_s - begin_s),
            host_ms=0.0,
            backward_target_tokens=sum(row.num_targets for row in rows),
        )

    def _update(self, batch: Sequence[TokenizedRow], num_targets: int) -> None:
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._trained, self.config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        num_tokens = sum(len(row.tokens) for row in batch)
        step, name = len(self.records) + 1, self.config.adapter
        now_s = time.perf_counter()
        self.records.append(TrainRecord(now_s, name, step, num_tokens, num_targets, self._loss))
        self._loss = 0.0


def _right_padded(rows: Sequence[TokenizedRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, int64 [B, S]."""
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), longest), np.int64)
    targets = np.full_like(tokens, -1)
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = row.tokens
        targets[place, : len(row.targets)] = row.targets
    return torch.from_numpy(tokens), torch.from_numpy(targets)
