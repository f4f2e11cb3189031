"""Which split a sample belongs to: the one it is named after, else a hash of its captions decides.

The hash needs no lists and is the same on every machine. It is over the captions, not the file name: pictures with the
same set of captions (two scans of one photo) land in one split, so a model is never tested on a caption set that it was
trained on. Near-identical pictures under different captions are not seen.
"""

import hashlib
import re
from typing import Any

from ldm.config import UserError
from ldm.data.faults import Faults

VAL, TEST = 0.02, 0.08  # shares of what the hash splits
NAMES = {"train": "train training", "val": "val valid validation dev", "test": "test testing eval evaluation"}
SPLITS = tuple(NAMES)
Samples = dict[str, dict[str, Any]]  # by name: `captions`, and where it is known the field `split`
SUSPECT = re.compile(
    r"(mini|rest|half)?(train|trainval|val|valid|validation|dev|development|test|eval|evaluation|h[eo]ld[ _-]?out)"
    r"(ing)?[\W\d_]*(set|data|split|images|pictures|photos)?[\W\d_]*"
)


def named_split(name: str, owner: str) -> str:
    """The split that a folder, shard or field is named after, "" for any other name.

    Raises UserError, naming the `owner` of the name, for one that looks like a split and is none of NAMES: guessing it
    would train on test pictures.
    """
    word = name.strip().lower()
    for split, names in NAMES.items():
        if word in names.split():
            return split
    if SUSPECT.fullmatch(word):
        raise UserError(f"{owner} looks like a split that is not known here; name it train, val or test, or otherwise")
    return ""


def position(key: str, seed: int) -> float:
    """A number in [0, 1), uniform over keys and fixed for a (key, seed): the first 53 bits of SHA-256."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def caption_group(captions: list[str]) -> str:
    """The key shared by pictures with the same set of captions; case, spacing and order do not count."""
    return "\n".join(sorted({" ".join(caption.casefold().split()) for caption in captions}))


def assign(groups: set[str], seed: int) -> dict[str, str]:
    """The split of each group of samples by its hash: adding or removing samples never moves another one.

    A small set can leave a split empty by chance. Where there are three groups or more, each split gets at least one:
    the group whose hash is nearest; the rest stays put.
    """
    members: dict[str, list[str]] = {split: [] for split in SPLITS}
    for place, group in sorted((position(group, seed), group) for group in groups):
        members["test" if place < TEST else "val" if place < TEST + VAL else "train"].append(group)
    if len(groups) >= 3:
        if not members["train"]:
            members["train"].append((members["val"] or members["test"]).pop())
        for split in ("test", "val"):
            if not members[split]:
                members[split].append(next(others for others in members.values() if len(others) > 1).pop(0))
    return {group: split for split in members for group in members[split]}


def select(samples: Samples, split: str, seed: int, faults: Faults) -> list[str]:
    """The names of the samples of a split: by their field `split`; where none has it, `assign`.

    Where only some have the field, the others go into `faults`, and into no split. Raises UserError for a field that is
    no split's name.
    """
    if all(sample.get("split") is None for sample in samples.values()):
        groups = {name: caption_group(sample["captions"]) or name for name, sample in samples.items()}
        splits = assign({*groups.values()}, seed)
        return [name for name, group in groups.items() if splits[group] == split]
    names = []
    for name, sample in samples.items():
        if (field := sample.get("split")) is None:
            faults.add(name, f"{name} has no 'split', though other samples have one; add it")
        elif not (named := named_split(str(field), f"split {field!r} of {name}")):
            raise UserError(f"{name} has the unknown split {field!r}; name it train, val or test")
        elif named == split:
            names.append(name)
    return names
