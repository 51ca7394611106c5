"""Training text from a model behind an API: ``dualroute data generate``."""
