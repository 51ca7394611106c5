"""Configuration files: text with its place, values of a field's type, classes filled from tables.

    yaml_file.py   a file or a flag → :class:`~dualroute.configuration.yaml_file.Node`
    convert.py     a node and a type → a value
    table.py       a table of a file → an instance of a flat dataclass
    shipped.py     configurations found by name
    names.py       the valid name nearest to one that is none

The command line (:mod:`dualroute.cli`) stands on it, and so does what reads files of its own form.
"""
