"""Captions of shapes scenes: a small grammar in which every sentence is true and names every object."""

from dataclasses import replace

from ldm.data.shapes_scene import RELATIONS, Scene

NUMBERS = {2: "two", 3: "three"}
WORDINGS = {  # of "A is in this relation to B"
    "left of": ("{a} left of {b}", "{a} to the left of {b}"),
    "right of": ("{a} right of {b}", "{a} to the right of {b}"),
    "above": ("{a} above {b}",),
    "below": ("{a} below {b}",),
}


def plural(shape: str) -> str:
    """The shape's plural: "crosses", "circles"."""
    return shape + ("es" if shape.endswith("s") else "s")


def captions(scene: Scene) -> list[str]:
    """All captions of the scene: with and without sizes, in each wording, some as "a picture of ...".

    Each names every object; a caption without sizes, or without the relation, leaves them open.
    """
    plain, sized = _said(unsized(scene)), _said(scene)
    return [*plain, *sized, *(f"a picture of {sentence}" for sentence in plain)]


def _said(scene: Scene) -> list[str]:
    lists = wordings(replace(scene, relation=None))
    return [*wordings(scene), *lists] if scene.relation else lists


def unsized(scene: Scene) -> Scene:
    """The scene with the sizes of its things left open."""
    return replace(scene, things=tuple(replace(thing, size=None) for thing in scene.things))


def wordings(required: Scene) -> list[str]:
    """The sentences that say just what is required: sizes if they are given, the relation if there is one."""
    things = required.things
    nouns = [" ".join(filter(None, (thing.size, thing.colour, thing.shape))) for thing in things]
    if len(things) == 1:
        return [f"a {nouns[0]}", f"one {nouns[0]}"]
    if len(set(nouns)) == 1:
        return [f"{NUMBERS[len(things)]} {nouns[0].removesuffix(things[0].shape)}{plural(things[0].shape)}"]
    names = [f"a {noun}" for noun in nouns]
    if required.relation is None:
        orders = [names[i:] + names[:i] for i in range(len(names))]
        return [", ".join(order[:-1]) + " and " + order[-1] for order in orders]
    a, b = names
    forth = [wording.format(a=a, b=b) for wording in WORDINGS[required.relation]]
    back = [wording.format(a=b, b=a) for wording in WORDINGS[RELATIONS[required.relation]]]
    return forth + back
