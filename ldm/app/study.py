"""Questions about pictures in random, balanced order, and one person's way through them."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ldm.app.judgements import Judgement, JudgementStore
from ldm.app.picture_sets import Sample
from ldm.app.results import exposures

ANSWERS = {"single": ("real", "generated"), "pair": ("left", "right"), "preference": ("left", "right", "tie")}
FIXATION = 900  # ms in which a cross shows where the flash will be


def questions(kind: str, count: int, sets: Mapping[str, Sequence[Sample]], seed: int, session: str) -> list[Judgement]:
    """Judgements to be answered about the pictures of one model ("single", "pair") or of two ("preference"), in the
    order of `seed`; extra["truth"] is the right answer.

    Half of the single pictures are real, and half of the real pictures, or of one model's, are on the left (plus or
    minus one). No caption comes again before all others have come, in single pictures for real and generated ones
    apart. Both pictures of a question have one caption.
    """
    rng = random.Random(f"{kind} {seed}")
    (model, samples), (other, rivals) = [*sets.items(), ("", ())][:2]
    order = {heads: _shuffled(rng, len(samples)) for heads in (True, False)}
    result = []
    for heads in rng.sample([True, False] * -(-count // 2), count):
        i = next(order[heads or kind != "single"])
        if kind == "preference":
            pictures, models, truth = (samples[i].made, rivals[i].made), (model, other), ""
            models = models if heads else models[::-1]
        else:
            pictures, models, truth = (samples[i].real, samples[i].made), (model, ""), ANSWERS[kind][not heads]
        pictures = pictures if heads else pictures[::-1]
        extra = {"pictures": pictures[: 1 if kind == "single" else 2], "truth": truth}
        shared = {"kind": kind, "session": session, "prompt": samples[i].caption, "seed": samples[i].seed}
        result.append(Judgement(model=models[0], other_model=models[1], extra=extra, **shared))
    return result


def _shuffled(rng: random.Random, count: int) -> Iterator[int]:
    while True:
        yield from rng.sample(range(count), count)


@dataclass
class Study:
    """One person's way through questions of one kind. `rights`: which answers were right, those to earlier flashes
    included."""

    kind: str
    flash: bool
    questions: Sequence[Judgement]
    rights: list[bool]
    position: int = 0
    shown_at: float = 0.0  # by time.monotonic

    @property
    def question(self) -> Judgement | None:
        """The question to answer next."""
        return self.questions[self.position] if self.position < len(self.questions) else None

    @property
    def exposure(self) -> int | None:
        """Milliseconds for which the next flash is shown."""
        return exposures(self.rights)[-1] if self.flash else None

    def answer(self, number: int, store: JudgementStore) -> bool:
        """Stores the answer, by its number in ANSWERS, and goes on to the next question; returns False, and stores
        nothing, before the pictures have been seen."""
        wait = (FIXATION + self.exposure) / 1000 if self.flash else 0.0
        if self.question is None or time.monotonic() < self.shown_at + wait:
            return False
        answer, truth = ANSWERS[self.kind][number], self.question.extra["truth"]
        right = answer == truth if truth else None
        kind = "flash" if self.flash else self.kind
        store.add(replace(self.question, kind=kind, answer=answer, right=right, exposure_ms=self.exposure))
        self.rights.append(bool(right))
        self.position += 1
        return True
