"""What the order of samples is made of: the stream of documents, and a permutation computed at an index.

    document_stream.py  documents end to end: lengths, pieces, targets
    permutation.py      seeded words, and the keyed permutation of [0, n)

Next: `dualroute.data.plan`, which cuts the one into windows and visits them in the order of the other.
"""
