"""What the experts of a model specialise in, and what each is worth.

Every statistic stands next to its value by chance: after shuffling, or of experts that choose
independently. Experts are those of runtime/inference/scorer.py: of each token and block, the
strongest first.

# D documents  T tokens  N tokens of all documents  L blocks  E experts  K chosen experts
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.evaluation.bootstrap import RESAMPLES, intervals, ratios
from runtime.evaluation.information import (
    GROUPS,
    Information,
    entropy_of,
    half_width,
    information,
    without_each,
)
from runtime.evaluation.report import Figure, Plot, Section, Series, figure, section

# Tokens whose experts are kept, 2 bytes for each choice: more say little more.
MOST_TOKENS = 200_000
# What the chosen expert may depend on.
VARIABLES = ("token", "previous token", "class", "position", "document")
# Pairs of experts in the table of those that are chosen together.
PAIRS_SHOWN = 3
# Until a fit of loads has converged.
FITTING_STEPS = 500


@dataclass
class ExpertChoices:
    """The experts of the tokens of some documents, and the tokens."""

    num_experts: int
    experts: list[NDArray[np.uint16]] = field(default_factory=list)
    ids: list[NDArray[np.int64]] = field(default_factory=list)
    # Of each document: its number among all.
    documents: list[int] = field(default_factory=list)
    # Tokens whose experts are kept, start tokens included; whether there were more.
    num_tokens: int = 0
    is_cut: bool = False

    def add(self, d: int, ids_T: NDArray[np.int64], experts_LTK: NDArray) -> None:
        """Keep a document's experts as far as there is room, unless it has too few tokens.

        ids [T]: those that were read; the first is the start token.
        """
        room = MOST_TOKENS - self.num_tokens
        self.is_cut |= len(ids_T) > max(room, 1)
        ids_T, experts_LTK = ids_T[:room], experts_LTK[:, :room]
        if len(ids_T) < 2:
            return
        self.experts.append(experts_LTK.astype(np.uint16))
        self.ids.append(ids_T.copy())
        self.documents.append(d)
        self.num_tokens += len(ids_T)

    def is_like(self, other: ExpertChoices) -> bool:
        """Return whether both are of the same tokens, and of as many blocks, experts, choices."""
        if self.num_experts != other.num_experts or self.documents != other.documents:
            return False
        pairs = zip(self.experts, other.experts, strict=True)
        same_ids = zip(self.ids, other.ids, strict=True)
        return all(a.shape == b.shape for a, b in pairs) and all(
            np.array_equal(a, b) for a, b in same_ids
        )


def experts_section(choices: ExpertChoices, classes_V: NDArray[np.int64], seed: int = 0) -> Section:
    """Return what each block's strongest expert tells of token, position and document.

    classes [V]: number of each token's class. The start token of a document does not count.
    """
    top_LN = np.concatenate([own[:, 1:, 0] for own in choices.experts], axis=1).astype(np.int64)
    columns = _columns(choices, classes_V)
    groups_N = _groups(choices)
    figures: dict[str, Figure] = {}
    rows: list[list] = []
    N = top_LN.shape[1]
    series: list[Series] = [
        {"name": name, "x": [], "y": [], "low": [], "high": []} for name in VARIABLES
    ]
    for block, top_N in enumerate(top_LN):
        spread, low, high = entropy_of(top_N, groups_N)
        figures[f"block_{block}_entropy"] = figure(spread, N, low, high, "bits")
        for name, line in zip(VARIABLES, series, strict=True):
            found = information(top_N, columns[name], groups_N, seed)
            key = f"block_{block}_{name.replace(' ', '_')}"
            figures[key] = figure(found.value, N, found.low, found.high, "bits")
            rows.append([block, name, *_cells(found), spread])
            line["x"].append(f"block {block}")
            line["y"].append(found.value)
            line["low"].append(found.low)
            line["high"].append(found.high)
    plot: Plot = {
        "title": "What the strongest expert depends on",
        "kind": "points",
        "x_label": "",
        "y_label": "bits above the shuffled value",
        "series": series,
    }
    names = ["block", "of", "bits", "low", "high", "measured", "shuffled", "entropy of experts"]
    return section(
        "experts",
        figures,
        {"columns": names, "rows": rows},
        [plot],
        [
            "Bits that token, previous token, class, position (as a power of 2) or document tell "
            "of a token's strongest expert. The shuffled value is what chance gives; a figure is "
            "the difference. Intervals: jackknife over groups of documents.",
            *[f"Of the first {choices.num_tokens:,} tokens of the documents."] * choices.is_cut,
        ],
    )


def _cells(found: Information) -> list[float]:
    return [found.value, found.low, found.high, found.measured, found.shuffled]


def _per_token(choices: ExpertChoices, values_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each document's value, once for each of its tokens but the start."""
    return np.repeat(values_D, [len(ids) - 1 for ids in choices.ids])


def _groups(choices: ExpertChoices) -> NDArray[np.int64]:
    """Return the group of each token for a jackknife, [N]: the documents' order means nothing."""
    return _per_token(choices, np.arange(len(choices.ids)) % GROUPS)


def _columns(choices: ExpertChoices, classes_V: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return what the strongest expert may depend on, [N] each, by the names of VARIABLES."""
    token_N = np.concatenate([ids[1:] for ids in choices.ids])
    position = [np.frexp(np.arange(1, len(ids)))[1] - 1 for ids in choices.ids]
    values = (
        token_N,
        np.concatenate([ids[:-1] for ids in choices.ids]),
        classes_V[token_N],
        np.concatenate(position).astype(np.int64),
        _per_token(choices, np.arange(len(choices.ids))),
    )
    return dict(zip(VARIABLES, values, strict=True))


def membership(experts_TK: NDArray, num_experts: int) -> NDArray[np.bool_]:
    """Return which experts each token chose, [T, E]."""
    chosen_TE = np.zeros((len(experts_TK), num_experts), dtype=bool)
    np.put_along_axis(chosen_TE, experts_TK.astype(np.int64), True, axis=1)
    return chosen_TE


def together_section(choices: ExpertChoices) -> Section | None:
    """Return how often two experts are chosen for one token, over what independent ones would be.

    Independent: each token draws K experts without replacement, by the block's own loads. None for
    one chosen expert per token, or where all are chosen.
    """
    L, _, K = choices.experts[0].shape
    E = choices.num_experts
    if K < 2 or K >= E:
        return None
    figures: dict[str, Figure] = {}
    rows = []
    masks = without_each(_groups(choices))
    upper = np.triu_indices(E, 1)
    for block in range(L):
        own = [membership(experts[block, 1:], E) for experts in choices.experts]
        chosen_NE = np.concatenate(own).astype(np.float32)
        N = len(chosen_NE)
        measured, expected = _pairs(chosen_NE, K)
        excess = _excess(measured, expected)
        half = half_width(excess, [_excess(*_pairs(chosen_NE[kept], K)) for kept in masks])
        figures[f"block_{block}_excess"] = figure(excess, N, excess - half, excess + half)
        lift = ratios(measured, expected)
        best = np.argsort(expected - measured, kind="stable")[:PAIRS_SHOWN]
        for i in best.tolist():
            pair = f"{upper[0][i]} and {upper[1][i]}"
            rows.append([block, pair, float(measured[i]), float(expected[i]), float(lift[i]), N])
    return section(
        "experts together",
        figures,
        {
            "columns": ["block", "experts", "share of tokens", "by chance", "ratio", "tokens"],
            "rows": rows,
        },
        notes=[
            "excess is the share of chosen pairs that independent experts with the same loads "
            "would place elsewhere: 0 is none. The table has the pairs that are most above chance."
        ],
    )


def _pairs(
    chosen_NE: NDArray[np.float32], K: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the share of tokens of each pair, and that by chance, both of pairs i < j."""
    upper = np.triu_indices(chosen_NE.shape[1], 1)
    # Whole numbers below 2^24: exact, in whatever order they are added.
    together_EE = (chosen_NE.T @ chosen_NE).astype(np.float64)
    load_E = together_EE.diagonal() / len(chosen_NE)
    return together_EE[upper] / len(chosen_NE), _expected_pairs(load_E, K)[upper]


def _excess(measured: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Return the share of pairs that are where chance would not put them."""
    return float(np.abs(measured - expected).sum() / (2 * measured.sum()))


def _expected_pairs(load_E: NDArray[np.float64], K: int) -> NDArray[np.float64]:
    """Return the share of tokens of each pair [E, E] where experts are independent.

    load [E]: share of tokens that chose each. A pair's share is a_i * a_j, with the a that give the
    loads: quasi-independence, because no expert is chosen twice (Goodman 1968).
    """
    rows_E = load_E * (K - 1)
    a_E = rows_E / np.sqrt(max(rows_E.sum(), 1e-300))
    for _ in range(FITTING_STEPS):
        others_E = np.maximum(a_E.sum() - a_E, 1e-300)
        # The root of the correction: the plain one swings.
        a_E = np.sqrt(a_E * rows_E / others_E)
    pairs_EE = np.outer(a_E, a_E)
    np.fill_diagonal(pairs_EE, 0.0)
    return pairs_EE


class Overlap:
    """How many of a token's experts two checkpoints share, block by block; sums of documents."""

    def __init__(self, num_documents: int, num_blocks: int, num_experts: int):
        self.num_experts = num_experts
        self.shared_DL = np.zeros((num_documents, num_blocks))
        self.tokens_D = np.zeros((num_documents, 1))
        # How often each expert is chosen, by each checkpoint.
        self.loads_2LE = np.zeros((2, num_blocks, num_experts))

    def add(self, d: int, experts_LTK: NDArray, other_LTK: NDArray) -> None:
        """Compare the experts of document d, without its start token."""
        self.tokens_D[d] = experts_LTK.shape[1] - 1
        for block, pair in enumerate(zip(experts_LTK[:, 1:], other_LTK[:, 1:], strict=True)):
            mine_TE, other_TE = (membership(own, self.num_experts) for own in pair)
            self.shared_DL[d, block] = (mine_TE & other_TE).sum() / pair[0].shape[1]
            self.loads_2LE[0, block] += mine_TE.sum(axis=0)
            self.loads_2LE[1, block] += other_TE.sum(axis=0)

    def section(self, resamples: int = RESAMPLES) -> Section:
        """Return the share of chosen experts that both checkpoints chose, and that by chance.

        By chance: the same loads, each checkpoint's experts independent of the other's.
        """
        L, N = self.shared_DL.shape[1], self.tokens_D.sum()
        columns = np.concatenate([self.shared_DL, self.tokens_D], axis=1)
        found = intervals(columns, lambda sums: ratios(sums[..., :-1], sums[..., -1:]), resamples)
        figures: dict[str, Figure] = {}
        rows = []
        for block, one in enumerate(found):
            mine_E, other_E = self.loads_2LE[:, block]
            chance = float((mine_E * other_E).sum() / (N * mine_E.sum()))
            figures[f"block_{block}_overlap"] = figure(one.value, int(N), one.low, one.high)
            rows.append([block, one.value, one.low, one.high, chance, int(N)])
        assert len(rows) == L
        return section(
            "experts shared with the other checkpoint",
            figures,
            {"columns": ["block", "shared", "low", "high", "by chance", "tokens"], "rows": rows},
            notes=["Experts have the same numbers only if one checkpoint grew out of the other."],
        )
