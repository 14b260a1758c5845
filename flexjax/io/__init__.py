"""Files in the formats of others: weights, tokenizers, PEFT adapters and datasets."""
