"""Text from a model: sampling, generation with caches, and a decoding step as one compiled program."""
