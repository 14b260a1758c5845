"""Decoding a job's gradients into new weights: AdamW and learning-rate schedules."""
