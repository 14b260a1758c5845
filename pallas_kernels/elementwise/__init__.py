"""`api` is public; `reference` is the specification, `llvm` the path of a CPU."""
