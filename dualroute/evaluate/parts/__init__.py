"""The parts of a suite: each module has ``cells(settings, model)``.

    perplexity.py   bits per byte and per word, by source and by position
    ruler.py        long context: the texts of :mod:`dualroute.evaluate.long_context`
    harness.py      tasks of lm-evaluation-harness, by the model of harness_model.py
    fairness.py     CrowS-Pairs, WinoBias, BBQ

The part ``task`` is beside the tasks (:mod:`dualroute.tasks.suite`).
"""
