"""Whether a data set has changed, from names, sizes, times and captions: no picture is decoded."""

import hashlib
from typing import Any

import numpy as np

from ldm.data.faults import all_captions

KEY = 16  # bytes of a picture's hash


def identities(dataset: Any) -> np.ndarray:
    """A hash of each picture, uint8 (N, KEY): another where its file, or the size that it is read at, changes."""
    size = getattr(dataset, "size", None)
    rows = (repr((size, *identity(dataset, i))).encode() for i in range(len(dataset)))
    return np.frombuffer(b"".join(hashlib.sha256(row).digest()[:KEY] for row in rows), np.uint8).reshape(-1, KEY)


def identity(dataset: Any, index: int) -> tuple[str, str]:
    """The key of a picture, and a string that changes with it: `dataset.identity(index)`, or a hash of its pixels."""
    if hasattr(dataset, "identity"):
        return dataset.identity(index)
    sample = dataset[index]
    return sample["key"], hashlib.sha256(sample["image"].contiguous().numpy()).hexdigest()


def fingerprint(dataset: Any) -> str:
    """SHA-256 of a data set, another where any picture, caption or key, or their order, changes."""
    digest = hashlib.sha256(identities(dataset).tobytes())
    for captions in all_captions(dataset):
        digest.update(repr(captions).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
