"""Direct preference optimization: its loss, and what the reference model says, computed once."""
