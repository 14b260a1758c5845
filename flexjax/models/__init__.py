"""The decoder: its weights, its layers as pure functions, and the nnx module around them."""
