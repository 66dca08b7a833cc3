"""Trained rows of a frozen vocabulary, in shards.

In one process they are rows of the matrix's own memory (runtime/posttraining/lora.py). In shards
each tensor has memory of its own, so an update of the rows would never reach the matrix: the head
would read the rows that the run started with. So they are copied into it before each pass.
"""

from __future__ import annotations

import torch
from torch import nn

from runtime.base.ranks import Ranks
from runtime.checkpoint.adapter import ROWS, Adapter, adapter_of


def keep_trained_rows(model: nn.Module, ranks: Ranks) -> None:
    """Let each pass of a model in shards begin with its trained rows in their matrices."""
    adapter = adapter_of(model)
    if adapter is not None and adapter.num_rows:
        # Before the hook that gathers the weights.
        model.register_forward_pre_hook(lambda *_: _copy_rows(model, adapter, ranks), prepend=True)


@torch.no_grad()
def _copy_rows(model: nn.Module, adapter: Adapter, ranks: Ranks) -> None:
    parameters = dict(model.named_parameters())
    for rows_name, name in ROWS.items():
        if rows_name in parameters:
            matrix, rows = parameters[name], ranks.whole(parameters[rows_name])
            first, own = adapter.first_row, ranks.rows(matrix)
            start, stop = max(own.start, first), min(own.stop, adapter.rows.stop)
            if start < stop:
                to = ranks.local(matrix)[start - own.start : stop - own.start]
                to.copy_(rows[start - first : stop - first])
