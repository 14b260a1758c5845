"""The same work as a competent user of transformers and PEFT does it, on torch.

Needs torch, transformers and peft (the `oracle` extra); nothing else in flexjax imports this file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from flexjax.bench.harness import Cost, now


@dataclasses.dataclass(frozen=True)
class TrainedSteps:
    """Optimizer steps of one run.

    Attributes:
      losses: Mean loss per target token of each step's batch, before the step.
      marks: Clocks at the start and after each step.
    """

    losses: tuple[float, ...]
    marks: tuple[Cost, ...]

    def cost(self, first: int = 0) -> Cost:
        """What the steps from `first` on took."""
        return self.marks[-1] - self.marks[first]


class TorchPeer:
    """One base model to generate with and another under PEFT, float32, on a few cores."""

    def __init__(self, model_dir: str | Path, adapter_dir: str | Path, num_threads: int):
        torch.set_num_threads(num_threads)
        transformers.utils.logging.disable_progress_bar()
        self._model_dir = str(model_dir)
        self._adapter_dir = str(adapter_dir)
        self._base = self._load()
        self._base.eval()

    def _load(self) -> transformers.PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(
            self._model_dir, dtype=torch.float32, attn_implementation="sdpa"
        )

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits of whole sequences, [B, S, V]."""
        with torch.inference_mode():
            return self._base(torch.from_numpy(tokens).long()).logits.numpy()

    def generate(self, prompts: np.ndarray, num_tokens: int, cache: str | None) -> list[list[int]]:
        """Generates greedily, all prompts in one batch, with the KV cache on.

        Args:
          prompts: Token ids, int32 [B, S].
          num_tokens: Tokens to generate for each, no more and no fewer.
          cache: None for the default cache, or "static".

        Returns:
          The generated tokens of each prompt.
        """
        ids = torch.from_numpy(prompts).long()
        options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
        with torch.inference_mode():
            out = self._base.generate(  # type: ignore[operator]  # torch types it as Tensor
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
                **options,
            )
        return out[:, prompts.shape[1] :].tolist()

    def finetune(
        self,
        tokens: np.ndarray,
        *,
        steps: int,
        batch_size: int,
        micro_batch: int,
        learning_rate: float,
        max_grad_norm: float,
    ) -> TrainedSteps:
        """Finetunes the adapter from its initial values with AdamW.

        Args:
          tokens: Sequences, taken in order and over again, int32 [n, S]; every token is a target.
          steps: Optimizer steps.
          batch_size: Sequences per optimizer step.
          micro_batch: Sequences per forward and backward pass; divides `batch_size`.
          learning_rate: Constant.
          max_grad_norm: Global norm that gradients are clipped to.
        """
        model = peft.PeftModel.from_pretrained(
            self._load(), self._adapter_dir, is_trainable=True, low_cpu_mem_usage=False
        )
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        rows = torch.from_numpy(tokens).long()
        share = micro_batch / batch_size  # rows are equally long, so a mean of means is exact
        losses, marks = [], [now()]
        for step in range(steps):
            index = (step * batch_size + torch.arange(batch_size)) % len(rows)
            loss_sum = 0.0
            for part in index.split(micro_batch):
                batch = rows[part]
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss * share
                loss.backward()
                loss_sum += loss.item()
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss_sum)
            marks.append(now())
        return TrainedSteps(tuple(losses), tuple(marks))
