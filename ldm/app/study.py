"""One person's way through questions about pictures, and the keeping of what they answer."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.app.human import Staircase
from ldm.app.pools import Pool
from ldm.app.questions import Question, questions
from ldm.app.store import Judgement, Store
from ldm.config import UserError

ANSWERS = {"single": ("real", "generated", ""), "pair": ("left", "right", ""), "preference": ("left", "right", "tie")}
WAIT = 900  # ms before a flash, in which a cross says where to look


@dataclass
class Study:
    """One person's way through the questions of one kind."""

    session: str
    kind: str
    flash: bool
    asked: list[Question]
    pools: dict[str, Pool]
    staircase: Staircase = field(default_factory=Staircase)
    at: int = 0
    asked_at: float = 0.0  # when the question was sent, by time.monotonic

    @property
    def wait(self) -> float:
        """Seconds until the picture of a flash has been seen, and an answer is one."""
        return (WAIT + self.staircase.exposure) / 1000 if self.flash else 0.0

    @property
    def question(self) -> Question | None:
        """The one to answer next."""
        return self.asked[self.at] if self.at < len(self.asked) else None


def begin(
    kind: str, flash: bool, count: int, pools: dict[str, Pool], seed: int, session: str = "", past: Sequence[bool] = ()
) -> Study:
    """A study with `count` questions over the pictures of pools, by model; pictures are named by (model, i), real ones
    by ("", i). `past` are the session's earlier answers to such flashes: the staircase goes on where it was."""
    (first, *_) = pools.values()
    numbers = range(len(first.captions))
    made = {model: [(model, i) for i in numbers] for model in pools}
    asked = questions(seed, kind, count, made, [("", i) for i in numbers])
    session = session or uuid.uuid4().hex[:12]
    stairs = Staircase.replay(past)
    return Study(session=session, kind=kind, flash=flash, asked=asked, pools=pools, staircase=stairs)


def file_of(study: Study, picture: tuple[str, int]) -> Path:
    """Where a picture of a question is."""
    model, i = picture
    pool = study.pools[model or next(iter(study.pools))]
    return pool.made[i] if model else pool.real[i]


def caption_of(study: Study, question: Question) -> str:
    """The caption that the (first) picture of a question is of."""
    return next(iter(study.pools.values())).captions[question.pictures[0][1]]


def judge(study: Study, answer: str, folder: Path, store: Store) -> Judgement:
    """Keeps an answer to the study's question, and on to the next one (UserError, and still at this one)."""
    question = study.question
    if question is None or answer not in ANSWERS[study.kind]:
        raise UserError(f"there is no question to answer with {answer!r:.40}")
    right = None if question.truth is None else answer == question.truth
    number = question.pictures[0][1]
    seed = next(iter(study.pools.values())).seeds[number]
    files = [file_of(study, picture).relative_to(folder).as_posix() for picture in question.pictures]
    found = store.add(
        Judgement(
            kind="flash" if study.flash else study.kind,
            session=study.session,
            model=question.model,
            other_model=question.other_model,
            prompt=caption_of(study, question),
            seed=seed,
            exposure_ms=study.staircase.exposure if study.flash else None,
            answer=answer,
            right=right,
            extra={"pictures": files},
        )
    )
    if study.flash:
        study.staircase = study.staircase.answer(bool(right))
    study.at += 1
    return found
