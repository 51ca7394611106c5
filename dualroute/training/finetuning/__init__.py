"""Fine-tuning strategies: adapters, freezing, gradual unfreezing, rates by depth, early stopping."""
