"""All runs beneath a folder at a glance: :mod:`.state` reads one, :mod:`.table` shows them, :mod:`.compare`
sets two beside each other, :mod:`.clean` removes what no run will ever use.
"""
