"""The pass of a model over held-out text. What it finds becomes sections elsewhere."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from runtime.data.tokenizer import Tokenizer
from runtime.evaluation.documents import Documents
from runtime.evaluation.encoded import FIRST, Encoded, encode_documents
from runtime.evaluation.experts import ExpertChoices
from runtime.evaluation.text_sums import Sums, add_document, empty_sums
from runtime.inference.scorer import Scorer


def encoded(documents: Documents, tokenizer: Tokenizer) -> Encoded:
    """Return the documents for a model. Raise ValueError if nothing of them can be scored."""
    result = encode_documents(documents.texts, tokenizer)
    if not result.num_tokens:
        raise ValueError(
            "no document has a token to score: this model's tokenizer has no start token, and "
            "each text is a single token"
        )
    return result


def read_documents(
    scorer: Scorer,
    documents: Encoded,
    choices: ExpertChoices | None = None,
    label: str = "",
) -> Sums:
    """Return the sums of each document.

    choices: keeps the experts, if the scorer gives them. label: of a bar on a terminal; "" = none.
    """
    sums = empty_sums(len(documents.ids))
    counts_V = documents.counts(scorer.config.vocabulary_size)
    scored = scorer.scores(own.tolist() for own in documents.ids)
    bar = tqdm(scored, label, len(documents.ids), leave=False, disable=None if label else True)
    for d, scores in enumerate(bar):
        ids_T = documents.ids[d].astype(np.int64)
        add_document(
            sums,
            d,
            ids_T[FIRST:],
            int(documents.num_bytes[d]),
            scores.log_probs_T,
            scores.best_log_probs_T,
            scores.is_greedy_T,
            counts_V,
        )
        if choices is not None and scores.experts_LTK is not None:
            choices.add(d, ids_T[:-1], scores.experts_LTK)
    return sums
