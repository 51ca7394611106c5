"""What a model has and what it costs, from its configuration alone; no torch is imported here."""
