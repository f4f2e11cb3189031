"""About 7,000 captioned emoji in two styles: Microsoft's Fluent ("3D") and Google's Noto ("flat").

The 64 px copy in `ldm/assets/data/emoji64` ships with the package; `scripts/prepare_data.py emoji` draws others
(`emoji_build`). The split is by content:

               pictures   held-out concepts   held-out combinations
    train      6442
    val         144              72                    72
    test        575             287                   288

A held-out concept is seen in the other style only; a held-out (role, skin tone, gender) in neither. No picture of val
or test is near-identical to one of train, and no caption is shared (`split.txt`: whole table).
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.config import UserError
from ldm.images import read_image

SHIPPED = Path(__file__).parents[1] / "assets" / "data" / "emoji64"
KINDS = {
    **dict.fromkeys(("People & Body", "Smileys & Emotion"), "faces and hands"),
    **dict.fromkeys(("Animals & Nature", "Food & Drink"), "animals and food"),
    **dict.fromkeys(("Objects", "Activities", "Travel & Places"), "objects"),
    **{"Flags": "flags", "Symbols": "symbols", "Component": "symbols"},
}


class Emoji:
    """One split of an emoji set, held in memory as compressed pictures (10 MB at 64 px), map-style.

    `emoji[i]` -> {"image": uint8 (3, size, size), "captions": list[str], "key": str}. `emoji.records[i]` has
    key, captions, concept, style ("3D" | "flat"), group, held_out ("" | "concept" | "combination"), and role,
    skin_tone and gender (empty where there is none). `folder` is a set that `prepare_data.py emoji` built;
    without it the shipped copy is read, up to 64 px. Raises UserError for a folder that is no such set, and a
    size above that of the stored pictures.
    """

    def __init__(self, size: int = 64, split: str = "train", folder: str | Path | None = None) -> None:
        folder = Path(folder or SHIPPED)
        self.size = size
        self.records, self.pictures = _read(folder, split)
        stored = Image.open(io.BytesIO(self.pictures[0])).width
        if not 1 <= size <= stored:
            raise UserError(
                f"emoji size {size} is not in 1..{stored}, the size of {folder.name}; for larger pictures run"
                " scripts/prepare_data.py emoji --size 128 --out DIR and name DIR as the data's path"
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = read_image(self.pictures[index], self.size, name=record["key"])
        return {"image": image, "captions": record["captions"], "key": record["key"]}

    def captions(self, index: int) -> list[str]:
        """The captions of picture `index`, without decoding it."""
        return self.records[index]["captions"]

    def identity(self, index: int) -> tuple[str, str]:
        """The key and the hash of picture `index`."""
        return self.records[index]["key"], hashlib.sha256(self.pictures[index]).hexdigest()

    def concept(self, index: int) -> str:
        """The thing that picture `index` shows, in one of two styles and, for people, of six skin tones."""
        return self.records[index]["concept"]

    def new_combination(self, index: int) -> bool:
        """Whether training shows the role of picture `index` in no style with its skin tone and gender."""
        return self.records[index]["held_out"] == "combination"

    def kind(self, index: int) -> str:
        """One of six kinds of picture, by which evaluations report. Of People & Body, those with a gender (which every
        person has, "person" where it is open) are "people", the others (hands, ears, brain) "faces and hands"."""
        record = self.records[index]
        return "people" if record["gender"] else KINDS[record["group"]]


def _read(folder: Path, split: str) -> tuple[list[dict[str, Any]], list[bytes]]:
    records, pictures = [], []
    # The shipped shards are gzipped: at 64 px, tar's own headers and padding outweigh the pictures.
    for file in sorted(folder.glob(f"{split}-*.tar*")):
        try:
            with tarfile.open(file) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}
            keys = dict.fromkeys(name.partition(".")[0] for name in members)
            records += [json.loads(members[f"{key}.json"]) | {"key": key} for key in keys]
            pictures += [members[f"{key}.webp"] for key in keys]
        except (tarfile.TarError, OSError, EOFError, ValueError, KeyError) as error:
            raise UserError(f"emoji shard {str(file)!r} is broken ({error}); build the set again") from None
    if not records:
        raise UserError(f"{str(folder)!r} holds no emoji set with a split {split!r}; prepare_data.py emoji builds it")
    return records, pictures
