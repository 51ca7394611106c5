"""Several sources in one training: whose turn each sample is, and the samples of all of them as one plan.

    config.py     what a mixture can be told
    schedule.py   weights → turns: after n samples each source has had its share, less than one sample off
    plan.py       turns → samples: a plan like that of one source
    windows.py    samples → windows, each read from its own folder
    sources.py    the folders: opened, compared, described
    history.py    what was read so far cannot change; what comes may

Next: `dualroute.data.module`, which gives the loaders such a plan where there are several sources.
"""
