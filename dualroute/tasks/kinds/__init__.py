"""Kinds of tasks, one short file each; see :mod:`dualroute.tasks`.  A file here is a kind of its name."""
