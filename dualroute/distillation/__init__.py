"""Distillation: a teacher's answers as targets, live or cached."""
