"""Data sets that lie elsewhere: on an HTTP server, in an object store, behind a command.

    address.py        which texts name such a set, and the addresses of its files
    config.py         how patiently they are read, and where copies are kept
    stores.py         one attempt to bring a file: HTTP, fsspec, a command through webdataset's openers
    http_transfer.py  the attempt over HTTP: ranges, versions, lengths, slow servers
    disk_cache.py     the folder of copies that the processes of a node share: turns, room, eviction
    mirror.py         one set in it: files by name, each compared with its checksum, retries
    prefetch.py       brings the shards that the plan will need next

Next: `dualroute.data.manifest`, which opens a set by its address, and `dualroute.data.reader`.
"""
