"""`api` is public; `reference` is the specification and the path of a CPU."""
