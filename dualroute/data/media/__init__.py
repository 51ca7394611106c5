"""Pictures and recordings as numbers: the part that training and an exported folder have in common.

These files import numpy and one library each, and nothing of a task: `dualroute export` lays them beside the
model's own source.
"""
