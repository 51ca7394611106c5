"""What a trained model is for: tasks, each of them a reader × a head × a metric × a trivial baseline.

One trainer, one data path, one architecture file; a *kind* of task is one short file in
:mod:`dualroute.tasks.kinds`, a class that is derived from :class:`dualroute.tasks.kind.Kind`:

1. ``roles`` names the columns that a row has (``text``, ``label``); :mod:`~dualroute.tasks.data.rows` reads
   rows from csv, tsv, jsonl, parquet, conll, SQuAD's json, folders and the Hugging Face hub, and counts those
   that cannot be used.
2. ``fit(rows)`` looks over the training rows once (names of labels); ``head()`` then says what leaves the
   model (:class:`~dualroute.model.config.TaskHeadConfig`), or null for the next token.
3. ``encode(row)`` makes :class:`~dualroute.tasks.data.examples.Example`: arrays with one entry a token
   (``input_ids``, ``labels``, ``outputs``: where an output is wanted, and whatever else the kind's loss or
   frontend asks for).  A row may give several (windows over a long text).  ``BadRow`` leaves the row out,
   counted by its reason.
4. :mod:`~dualroute.tasks.data.packing` packs examples whole into windows of ``data.context`` slots, each
   example a segment (``segment_ids``) as documents are in pretraining, in an order that is a pure function of
   (lengths, fingerprint, seed, epoch, context).  :class:`~dualroute.tasks.data.module.TaskDataModule` makes
   batches of them, so that accumulation, elastic ranks, exact resume and budgets in tokens are pretraining's.
5. ``loss(outputs, batch, …)`` is summed over targets; :class:`~dualroute.tasks.module.Finetune` divides it by
   the targets of the global batch.  The default is the cross-entropy of ``labels``, with class weights and
   label smoothing; without a head it is pretraining's next-token loss.
6. ``reduce(outputs)`` keeps what is needed of an example's outputs, ``decode(row, parts)`` makes the columns
   of a prediction from those of all the row's examples, ``score(targets, predictions)`` the metrics, by the
   field's libraries (:mod:`~dualroute.tasks.metrics`).  A kind that writes text (``writes_text``) has
   ``prompt(row)`` and is asked with the model's own decoding instead.
7. ``baselines()`` are the trivial predictions to compare with (:mod:`~dualroute.tasks.baselines`).

``task.json`` in a checkpoint holds what prediction needs (:mod:`~dualroute.tasks.description`).  The commands
are :mod:`~dualroute.tasks.run` (finetune), :mod:`~dualroute.tasks.predict` and
:mod:`~dualroute.tasks.evaluate`.
"""
