"""Training: LightningModules, one per stage, and what drives them (strategy, checkpoints, monitor)."""
