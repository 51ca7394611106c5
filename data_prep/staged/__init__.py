"""A corpus after cleaning, on the disk: made once, in parallel and restartable, then read as often as it
takes.

`lots` says what one task does, `pool` shares it among processes, `parts` are the files that come out of it,
`staging` leads the work and finds the duplicates, `steps` lets datatrove's executors do it."""
