"""Fifty AdamW steps against PEFT and torch, on the same data in the same order."""

import math

import numpy as np
import pytest
from helpers import (
    draw_lora,
    draw_rows,
    make_engine,
    relative,
    tiny_config,
    tiny_weights,
    torch_model,
    torch_sum_loss,
    write_adapter,
    write_model,
)

from flexjax.config import FinetuneConfig, LoraConfig, SamplingParams
from flexjax.io.peft_adapter import load_peft_adapter

STEPS, BATCH, RATE = 50, 4, 5e-3
LOSS_TOLERANCE = 1e-3
ADAPTER_TOLERANCE = 5e-4
"""Relative; AdamW divides by the root of the second moment, which magnifies differences in
components whose gradient is near zero."""

CASES = {
    "cosine": {
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
    },
    "constant": {"schedule": "constant", "weight_decay": 0.01, "max_grad_norm": 0.3},
}


def torch_run(torch, model, rows, options):
    """The same training in torch; returns the mean loss of each step."""
    import transformers

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=options["weight_decay"])
    warmup = math.ceil(options.get("warmup_ratio", 0) * STEPS)
    scheduler = transformers.get_scheduler(options["schedule"], optimizer, warmup, STEPS)
    losses, rates = [], []
    for step in range(STEPS):
        start = step * BATCH % len(rows)
        batch = rows[start : start + BATCH]
        count = sum(int((row.targets >= 0).sum()) for row in batch)
        optimizer.zero_grad()
        loss = sum(torch_sum_loss(model, row.tokens, row.targets) for row in batch) / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options["max_grad_norm"])
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return np.asarray(losses), np.asarray(rates)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_match_peft(tmp_path, name):
    torch = pytest.importorskip("torch", reason="the oracle (PEFT) needs torch")
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    rng = np.random.default_rng(17)
    config = tiny_config("llama", num_layers=2)
    weights = tiny_weights(config, seed=1)
    lora = LoraConfig(r=4, alpha=8.0)
    path = write_adapter(tmp_path / "init", config, lora, draw_lora(rng, config, lora, 0.1))
    rows = draw_rows(rng, rng.integers(4, 40, 5 * BATCH), is_masked=True)
    options = CASES[name]
    engine = make_engine(config, weights, window_buckets=(32,), chunk_buckets=(48,))
    job = engine.finetune(
        FinetuneConfig(
            adapter="job", dataset=[row.source for row in rows], init_adapter=path,
            batch_size=BATCH, learning_rate=RATE, epochs=10, max_steps=STEPS, shuffle=False,
            **options,
        )
    )  # fmt: skip
    engine.generate([[3, 1, 4]] * 3, SamplingParams(max_tokens=30, ignore_eos=True))
    job.wait()
    base = torch_model(write_model(tmp_path / "base", config, weights))
    model = peft.PeftModel.from_pretrained(base, str(path), is_trainable=True).eval()
    losses, rates = torch_run(torch, model, rows, options)
    records = job.metrics().steps
    np.testing.assert_allclose([r.learning_rate for r in records], rates, rtol=1e-9, atol=1e-15)
    gap = np.abs(np.asarray(job.metrics().losses) / losses - 1).max()
    model.save_pretrained(tmp_path / "theirs")
    engine.save_adapter("job", tmp_path / "ours")
    ours, theirs = (load_peft_adapter(tmp_path / n, config).arrays for n in ("ours", "theirs"))
    start = load_peft_adapter(path, config).arrays
    error = max(relative(ours[n][m], theirs[n][m]) for n in ours for m in "AB")
    moved = min(relative(start[n][m], theirs[n][m]) for n in ours for m in "AB")
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, deviation {gap:.2e}, "
          f"adapter {error:.2e} (moved {moved:.2f})")  # fmt: skip
    assert losses[-BATCH:].mean() < 0.9 * losses[:BATCH].mean() and moved > 0.05
    assert gap <= LOSS_TOLERANCE
    assert error <= ADAPTER_TOLERANCE
