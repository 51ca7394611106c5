"""One format of checkpoints: published, read, re-sharded."""
