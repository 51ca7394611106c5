"""How much memory a training needs, by part, and whether it does: :mod:`.parts` and :mod:`.check`."""
