"""A folder that transformers loads, without dualroute.

    folder.py                   writes it and compares it with the model
    bundle.py                   these very source files, made ready to lie in that folder
    configuration_dualroute.py  \\
    modeling_dualroute.py        } the part of it that speaks transformers
    tokenization_dualroute.py   /
    tokenizer_files.py          the sentencepiece model as tokenizer.json, or itself where that is not equal
    check_folder.py             loads the folder, in a Python that finds no dualroute
"""
