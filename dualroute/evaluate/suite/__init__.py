"""Suites: what ``dualroute evaluate --suite`` measures, part by part.

    config.py    a YAML file → the parts with their settings
    model.py     a path → the model that is measured, of any kind, and its answers (log-likelihoods, texts)
    cells.py     what a part is made of: cells, each measured, kept and resumed by itself; scores
    ranks.py     several processes that share the work of a cell
    record.py    the JSON file of the results: read, gone on with, written
    compare.py   two results, and which differences are more than chance
    run.py       all of it, in order

The parts themselves are in :mod:`dualroute.evaluate.parts`.
"""
