"""Evaluation: what a checkpoint is worth, and what it writes.  Needs no trainer and no DeepSpeed."""
