"""Log-probabilities under the weights that a run starts from: one float32 number a sequence.

They are computed once, and kept in a file next to the checkpoints: by the time of a resume the
weights have moved, and what they say of themselves is no reference.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime.base.files import write_atomic

FILE, ABOUT = "reference.safetensors", "reference"


class Reference:
    """Reference log-probabilities of pairs, [pairs, 2] (chosen, rejected); NaN where unknown.

    start: digest of the weights that they are of; data: fingerprint of the pairs.
    """

    def __init__(self, num_pairs: int, start: str, data: str):
        self.values = np.full((num_pairs, 2), np.nan, dtype=np.float32)
        self.identity = {"start": start, "data": data}

    @property
    def is_empty(self) -> bool:
        """Return whether no pair is known."""
        return bool(np.isnan(self.values).all())

    def lacks(self, numbers_P: np.ndarray) -> bool:
        """Return whether a pair with one of these numbers is unknown."""
        return bool(np.isnan(self.values[numbers_P]).any())

    def add(self, numbers_P: np.ndarray, log_probs_S: np.ndarray) -> None:
        """Take the sums of some pairs, [2 P]. What is known stays: a second epoch's rows differ."""
        known = self.values[numbers_P]
        self.values[numbers_P] = np.where(np.isnan(known), log_probs_S.reshape(-1, 2), known)

    def of(self, numbers_P: np.ndarray) -> np.ndarray:
        """Return the numbers of some pairs, float32 [2 P]."""
        return self.values[numbers_P].reshape(-1)

    def save(self, folder: str | Path) -> None:
        """Write the file, whole or not at all."""
        # One entry: safetensors writes several in any order.
        about = json.dumps(self.identity | {"digest": _digest(self.values)})
        contents = save({"log_probs": self.values}, metadata={ABOUT: about})
        write_atomic(Path(folder) / FILE, lambda file: file.write(contents))

    def load(self, folder: str | Path) -> str:
        """Take the numbers of the file in a folder; return why not, else ""."""
        path = Path(folder) / FILE
        if not path.is_file():
            return f"{path} is missing"
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
                values = file.get_tensor("log_probs")
        except (SafetensorError, OSError, ValueError):
            return f"{path} is damaged"
        digest = about.pop("digest", "")
        if about != self.identity:
            return f"{path} is of other weights or other data"
        if values.shape != self.values.shape or digest != _digest(values):
            return f"{path} is damaged"
        self.values = values.copy()
        return ""


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
