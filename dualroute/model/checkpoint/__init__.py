"""A checkpoint as files: what lies in its folder, how it is written, found, verified and read; no trainer."""
