"""Host-side decisions: what each step holds. Nothing here imports jax."""
