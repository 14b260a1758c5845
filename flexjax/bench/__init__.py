"""Benchmarks: a harness for timings and records, and the work that is timed."""
