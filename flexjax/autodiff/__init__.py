"""Token-level backpropagation: exact gradients of a LoRA, one window of tokens at a time."""

from flexjax.autodiff.windowed import windowed_value_and_grad as windowed_value_and_grad
