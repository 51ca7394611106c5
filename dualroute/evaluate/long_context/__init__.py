"""Texts that ask for something far away: RULER's configurations, passkey, facts in books.

    sample.py      a text with its answers, its length in tokens, how an answer is scored
    words.py       words that keys and lists are made of
    needles.py     niah_single_1 … niah_multiquery, passkey
    counting.py    vt (variable tracking), cwe and fwe (common and frequent words)
    questions.py   qa_1 and qa_2, over paragraphs of the user's
    facts.py       facts_1 … facts_3: who went where, between the sentences of a book
    tasks.py       all of them by name

RULER: Hsieh et al. 2024, https://arxiv.org/abs/2404.06654, whose prompts these are.  BABILong: Kuratov et al.
2024, https://arxiv.org/abs/2406.10149.  Nothing is downloaded: words are made here, a haystack is the
repeated sentence of RULER's first configuration unless a text is given, questions need paragraphs.
"""
