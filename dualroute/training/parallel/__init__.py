"""Who this rank is and how ranks share the work."""
