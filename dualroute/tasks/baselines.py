"""Trivial predictions that a model has to beat; scikit-learn does the work where there is any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dualroute.tasks.metrics import library


def majority(targets: Sequence[Any]) -> Any:
    """The commonest target, the first of equals."""
    return Counter(targets).most_common(1)[0][0]


def tfidf_classifier(texts: Sequence[str], targets: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Classes of ``asked`` by logistic regression on TF-IDF of words and pairs of words, or of characters
    where words are not divided by spaces."""
    feature_extraction = library("sklearn.feature_extraction.text")
    linear_model = library("sklearn.linear_model")
    pipeline = library("sklearn.pipeline")
    letters = sum(map(len, texts[:1000]))
    spaces = sum(text.count(" ") for text in texts[:1000])
    by_word = spaces * 12 > letters
    vectorizer = feature_extraction.TfidfVectorizer(
        analyzer="word" if by_word else "char",
        ngram_range=(1, 2) if by_word else (1, 3),
        token_pattern=r"(?u)\b\w+\b",
        sublinear_tf=True,
        max_features=200_000,
    )
    model = pipeline.make_pipeline(vectorizer, linear_model.LogisticRegression(C=10.0, max_iter=1000))
    model.fit(list(texts), list(targets))
    return [str(name) for name in model.predict(list(asked))]
