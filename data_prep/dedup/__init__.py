"""Exact and near duplicates: `shingles` makes hashes of a text, `signatures` a MinHash of them, `near`
finds who resembles whom, on the disk and in bounded memory."""
