"""From text to shards; `data_prep.prepare.prepare` is the whole of it in one call.

One document's way: `corpora` finds the files (`folder` walks, `download` fetches) -> `formats` opens them,
with `archives`, `records` and `columns` -> `clean` tidies, drops and splits -> `train_tokenizer` learns the
vocabulary -> `shards` writes tars -> `prepare` adds the manifest. Next is `dualroute.data.plan`, which reads
nothing but that manifest and the index files.

Nothing here knows the model or the trainer. Only the format of the manifest and the
tokenizer are shared, from `dualroute.data`.
"""
