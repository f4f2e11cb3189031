"""What an emoji shows, in words: concept, role, skin tone, gender, and captions with several wordings.

English CLDR names and aliases come from the PyPI package `emoji`, keywords and the tree of skin-tone variants
from emoji-datasource's `emoji.json`. Nothing here looks at pictures.
"""

import re
from typing import Any

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
STYLE_WORDINGS = {
    "3D": ("{plain}, 3D", "a 3D emoji of {natural}", "3D icon of {natural}"),
    "flat": ("{plain}, flat", "a flat emoji of {natural}", "flat icon of {natural}"),
}
_ADULTS = {
    "man": "man",
    "men": "man",
    "woman": "woman",
    "women": "woman",
    "person": "person",
    "people": "person",
}
_GENDERS = {**_ADULTS, "boy": "boy", "girl": "girl", "child": "person", "baby": "person"}
_NAMED = {  # roles whose CLDR names hide the gender: name -> (role, gender)
    "prince": ("royal", "man"),
    "princess": ("royal", "woman"),
    "person with crown": ("royal", "person"),
    "Santa Claus": ("Claus", "man"),
    "Mrs. Claus": ("Claus", "woman"),
    "Mx Claus": ("Claus", "person"),
    "merman": ("merperson", "man"),
    "mermaid": ("merperson", "woman"),
    "older person": ("old", "person"),
}
_REWORDED = (  # CLDR's "person: red hair" reaches us as "person red hair"
    (r"^(man|woman|person) (beard)$", r"\1 with a \2"),
    (r"^(man|woman|person) ((?:red|white|curly|blond) hair)$", r"\1 with \2"),
    (r"^(man|woman|person) bald$", r"bald \1"),
    (r"^(kiss|couple with heart) (woman|man) (woman|man)$", r"\1, \2 and \3"),
    (r"^family((?: man| woman| adult| girl| boy| child){2,})$", r"family of\1"),
    (r" SAR China$", ""),
)
_WITH_THE = re.compile(
    r"(United .*|Bahamas|Netherlands|Philippines|Maldives|Comoros|Seychelles|.* Republic|.* Territory"
    r"|.* Territories|Gambia|Isle of Man|European Union)$"
)
_NO_ARTICLE = {"People & Body", "Symbols", "Flags", "Component"}
_TAIL = re.compile(r" (?:with|without|in|on|of|over|under|behind|holding|showing|from|fluttering|at) .*")
_BARE = re.compile(  # no article: names in the plural, mass nouns, proper names, adjectives
    r"^[A-Z]|^(no|not|in|see|hear|speak)\b|^two |[^us]s$|[\d!?]$| and |-thirty$"
    r"|\b(rice|bread|popcorn|butter|salt|bacon|sushi|tempura|spaghetti|ice|ice cream|garlic|broccoli|corn"
    r"|meat|ginger root|sake|yarn|wood|rock|money|soap|fog|fire|mail|coral|tea|camping|bowling|badminton"
    r"|ping pong|breast-feeding|oden|hockey|film frames|star-struck|unlocked|locked|building construction"
    r"|sunrise|sunset|thread|x-ray|football|baseball|lacrosse|foggy|dizzy|dashing away|dna|luggage|dancing"
    r"|high voltage|skin tone|hair|o'clock|laughing|liquid|crossing)$"
)
_CONSONANT = re.compile(r"(eu|ew|uni|one|use|uk|ut)")

_UNKIND = ("shit", "hankey", "fu")


def codes(name: str) -> str:
    """A canonical spelling of a file's or sequence's code points: "23-FE0F-20E3" -> "0023-20e3"."""
    parts = [p.zfill(4) for p in re.split(r"[-_]", name.lower()) if p != "fe0f"]
    if len(parts) > 2 and parts[0] == "1f3f4" and parts[1].startswith("e00") and parts[-1] != "e007f":
        parts.append("e007f")  # the end tag of England's flag, which some packages drop
    return "-".join(parts)


def catalogue(entries: list[dict[str, Any]], names: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Code points -> description without style: every emoji and each of its skin-tone variants.

    `entries` is emoji-datasource's `emoji.json`; `names` maps `codes` to the `emoji` package's records. A
    description has concept, role, skin_tone, gender (empty where there is none), plain, natural, keywords.
    """
    table = {}
    for entry in entries:
        base = codes(entry["unified"])
        cldr = _words(names[base]["en"]) if base in names else entry["short_name"].replace("_", " ")
        described = _describe(entry, cldr, names.get(base, {}).get("alias", []))
        table[base] = {**described, "skin_tone": ""}
        for variation, item in entry.get("skin_variations", {}).items():
            tones = [TONES[part] for part in variation.lower().split("-")]
            table[codes(item["unified"])] = _toned(described, tones)
    return table


def captions_of(description: dict[str, str], style: str) -> list[str]:
    """Captions of a picture, most literal first, none twice: plain, natural, with style, keywords."""
    plain, natural, keywords = (description[name] for name in ("plain", "natural", "keywords"))
    texts = [plain, natural]
    texts += [wording.format(plain=plain, natural=natural) for wording in STYLE_WORDINGS[style]]
    texts += [keywords, f"{keywords}, {style}"] if keywords else []
    return list(dict.fromkeys(texts))


def _words(name: str) -> str:
    return re.sub(r"[“”‘]", "", name.strip(":").replace("_", " ")).replace("’", "'")


def _describe(entry: dict[str, Any], cldr: str, aliases: list[str]) -> dict[str, str]:
    plain = cldr
    for pattern, replacement in _REWORDED:
        plain = re.sub(pattern, replacement, plain)
    people = entry["subcategory"].startswith(("person", "family"))
    if entry["subcategory"] in ("country-flag", "subdivision-flag"):
        plain = f"flag of {'the ' if _WITH_THE.match(plain) else ''}{plain}"
    if plain.startswith("family of "):
        plain = "family of " + _join([f"a {word}" for word in plain.split()[2:]]).replace("a adult", "an adult")
    role, gender = _role(cldr, codes(entry["unified"])) if people else ("", "")
    if "skin_variations" in entry and not people:
        role = cldr  # hands and other parts of the body
    natural = plain
    if (people and _singular(plain)) or not (entry["category"] in _NO_ARTICLE or _BARE.search(_TAIL.sub("", plain))):
        natural = f"{_article(plain)} {plain}"
    keywords = _keywords(entry, plain, cldr, aliases)
    return {
        "concept": plain,
        "role": role,
        "gender": gender,
        "group": entry["category"],
        "plain": plain,
        "natural": natural,
        "keywords": keywords,
    }


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" and not _CONSONANT.match(phrase) else "a"


def _singular(phrase: str) -> bool:
    return not re.search(r"\b(people|men|women|Claus|hands)\b", phrase) and not phrase.startswith("kiss,")


def _role(name: str, sequence: str) -> tuple[str, str]:
    if name in _NAMED:
        return _NAMED[name]
    words = name.split()
    found = [_GENDERS[word] for word in words if word in _GENDERS]
    rest = [word for word in words if word not in _ADULTS and word != "and"]
    if name.startswith(("kiss ", "couple with heart ", "family ", "woman and man")):
        rest = [word for word in rest if word not in _GENDERS]
    parts = sequence.split("-")
    signs = {"2642": "man", "2640": "woman", "1f468": "man", "1f469": "woman"}
    gender = " and ".join(found) or next((signs[p] for p in parts if p in signs), "person")
    return " ".join(rest) or "adult", gender


def _toned(described: dict[str, str], tones: list[str]) -> dict[str, str]:
    if len(set(tones)) == 1:
        words, tone = f"{tones[0]} skin tone", tones[0]
    else:
        words, tone = f"{tones[0]} and {tones[1]} skin tones", " and ".join(tones)
    keywords = described["keywords"] and f"{described['keywords']}, {words}"
    result = {**described, "skin_tone": tone, "keywords": keywords}
    for name in ("plain", "natural"):
        listed = len(set(tones)) > 1 or "," in described[name]
        joint = ", " if listed else " and " if " with " in described[name] else " with "
        result[name] = described[name] + joint + words
    return result


def _keywords(entry: dict[str, Any], plain: str, cldr: str, aliases: list[str]) -> str:
    """Other names and the sort of thing it is, e.g. "dog face, dog, animal"; empty where there are none."""
    others = [re.sub(r"[_-]", " ", text.strip(":")) for text in [*aliases, *entry["short_names"]]]
    if entry["category"] == "Flags":
        others = [text for text in others if len(text) > 3 and not text.startswith("flag")]
    kinds = [] if entry["category"] == "People & Body" else re.split(r"-| & ", entry["subcategory"])
    kinds = [kind for kind in kinds if kind not in ("other", "alphanum", "symbol", "concerned")]
    known = (plain.lower(), cldr.lower(), *_UNKIND)
    texts = [t for t in [*others, *kinds] if t.lower() not in known and not re.search(r"\d|^.$", t)]
    texts = list(dict.fromkeys(text.lower() for text in texts))
    return ", ".join([cldr, *texts]) if texts else ""


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
