"""What a person asks of a data set: ``dualroute data inspect | stats | sample | verify | diff``.

documents.py  documents with what is noted of them, read in place; next: the commands
config.py     the options
inspect.py    what a set holds, by its manifest
stats.py      lengths, sources, languages, duplicates: tables, JSON
charts.py     the same as PNG
sample.py     documents as text
diff.py       what two sets do not have in common
"""
