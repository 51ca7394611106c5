"""A checkpoint in the making: captured, written by every rank its own part, published, kept or removed."""
