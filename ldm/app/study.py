"""Questions about pictures in random, balanced order, and one person's way through them."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ldm.app.judgements import Judgement, JudgementStore
from ldm.app.picture_sets import Sample
from ldm.app.results import exposures

ANSWERS = {"single": ("real", "generated"), "pair": ("left", "right"), "preference": ("left", "right", "tie")}
FIXATION = 900  # ms in which a cross shows where the flash will be


def questions(kind: str, count: int, sets: Mapping[str, Sequence[Sample]], seed: int, session: str) -> list[Judgement]:
    """Judgements to be answered about the pictures of one model ("single", "pair") or of two ("preference"), in the
    order of `seed`; extra["truth"] is the right answer.

    Half of the single pictures are real, and half of the real pictures, or of one model's, are on the left (plus or
    minus one). No caption comes again before all others have come. Both pictures of a question have one caption.
    """
    rng = random.Random(f"{kind} {seed}")
    (model, samples), (other, rivals) = [*sets.items(), ("", ())][:2]
    rounds = range(-(-count // len(samples)))
    order = [i for _ in rounds for i in rng.sample(range(len(samples)), len(samples))]
    result = []
    for first, i in zip(rng.sample([True, False] * -(-count // 2), count), order, strict=False):
        turn = 1 if first else -1
        if kind == "preference":
            pictures, models, truth = (samples[i].made, rivals[i].made), (model, other)[::turn], ""
        else:
            pictures, models, truth = (samples[i].real, samples[i].made), (model, ""), ANSWERS[kind][not first]
        extra = {"pictures": pictures[::turn][: 1 if kind == "single" else 2], "truth": truth}
        shared = {"kind": kind, "session": session, "prompt": samples[i].caption, "seed": samples[i].seed}
        result.append(Judgement(model=models[0], other_model=models[1], extra=extra, **shared))
    return result


@dataclass
class Study:
    """One person's way through questions of one kind; `rights`: which answers were right so far."""

    kind: str
    flash: bool
    questions: Sequence[Judgement]
    rights: list[bool] = field(default_factory=list)
    shown_at: float = 0.0  # by time.monotonic

    @property
    def question(self) -> Judgement | None:
        """The question to answer next."""
        return next(iter(self.questions[len(self.rights) :]), None)

    @property
    def exposure(self) -> int | None:
        """Milliseconds for which the next flash is shown."""
        return exposures(self.rights)[-1] if self.flash else None

    def answer(self, answer: str, store: JudgementStore) -> bool:
        """Stores one of ANSWERS and goes on to the next question; returns False, and stores nothing, for others and
        before the pictures have been seen."""
        question, exposure = self.question, self.exposure
        if (
            question is None
            or answer not in ANSWERS[self.kind]
            or (exposure and time.monotonic() < self.shown_at + (FIXATION + exposure) / 1000)
        ):
            return False
        truth, kind = question.extra["truth"], "flash" if self.flash else self.kind
        right = answer == truth if truth else None
        store.add(replace(question, kind=kind, answer=answer, right=right, exposure_ms=exposure))
        self.rights.append(bool(right))
        return True
