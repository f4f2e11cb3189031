"""Which split a sample belongs to, decided by a hash: no lists to keep, the same on every machine.

The hash is over the captions, not over the file name. Pictures with the same set of captions (two scans of
one photo, a frame saved as .jpg and as .png) are one group and land in one split, so a model is never tested
on a caption set it was trained on. What this does not see: near-identical pictures under different captions,
and a caption that two pictures share while their other captions differ. Sub-folders or shard names `train`,
`val` and `test` override it.
"""

import hashlib

SPLITS = ("train", "val", "test")


def position(key: str, seed: int) -> float:
    """A number in [0, 1), uniform over keys and fixed for a (key, seed): SHA-256's first 53 bits."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def split_of(key: str, seed: int, val: float, test: float) -> str:
    """ "test" for a share `test` of all keys, "val" for a share `val`, else "train". Adding or removing
    samples never moves another one; raising `val` or `test` only moves samples out of "train"
    (and with `test` from "val" to "test")."""
    place = position(key, seed)
    return "test" if place < test else "val" if place < test + val else "train"


def caption_group(captions: list[str]) -> str:
    """The key shared by pictures with the same set of captions; case, spacing and order do not count."""
    return "\n".join(sorted({" ".join(caption.casefold().split()) for caption in captions}))


def assign(groups: list[str], seed: int, val: float, test: float) -> list[str]:
    """The split of each sample, by its group's `split_of`.

    A small set can leave a split empty by chance. Where there are at least three groups, "train" and each
    split with a share above 0 get at least one: the group whose hash is nearest; the rest stays put.
    """
    places = {group: position(group, seed) for group in set(groups)}
    splits = {group: split_of(group, seed, val, test) for group in places}
    if len(places) >= 3:
        ordered = sorted(places, key=lambda group: (places[group], group))
        if "train" not in splits.values():
            splits[ordered[-1]] = "train"
        for name, share in (("test", test), ("val", val)):
            if share > 0 and name not in splits.values():
                splits[_spare(ordered, splits)] = name
    return [splits[group] for group in groups]


def _spare(ordered: list[str], splits: dict[str, str]) -> str:
    """The first group, by hash, whose split has another one left; "train" gives before the others do."""
    members = {name: [group for group in ordered if splits[group] == name] for name in SPLITS}
    return next(groups[0] for groups in members.values() if len(groups) > 1)
