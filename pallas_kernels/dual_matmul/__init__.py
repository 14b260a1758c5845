"""`api` is public; `reference` is the specification and the CPU path."""
