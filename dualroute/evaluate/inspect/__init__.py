"""What a model reads, head by head, and what each part is worth: the numbers and one page that shows them.

:func:`dualroute.evaluate.inspect.numbers.inspect_ids` gives the numbers, and ``dualroute inspect``
writes the page.
"""
