"""People judging pictures: statistics against scipy and simulated judges, balanced questions, the file of answers."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ldm.app import results as r
from ldm.app.judgements import Judgement, JudgementStore
from ldm.app.picture_sets import Sample
from ldm.app.study import ANSWERS, questions
from ldm.config import UserError


def test_staircase_is_hypes():
    """Zhou et al. 2019, section 2.1: range, first exposure, steps, and the rule of three up, one down."""
    answers = [True, True, True, True, True, False, True, True, True, False, False]
    assert r.exposures(answers) == [500, 500, 500, 470, 470, 470, 480, 480, 480, 450, 460, 470]
    assert (r.exposures([True] * 140)[-1], r.exposures([False] * 140)[-1]) == (100, 1000)


def answered(kind: str, truth: str, answer: str, **values) -> Judgement:
    given = {"kind": kind, "session": "s", "model": "m", "answer": answer, "right": answer == truth}
    return Judgement(**given | values)


def test_results_of_judges_of_known_skill():
    gullible = [answered("single", truth, "real") for truth in ("real", "generated") * 25]
    rows = r.results(gullible)["m"]
    assert rows["generated taken for real, single"] == "100% [87%, 100%]"
    assert rows["real taken for generated, single"] == "0% [0%, 13%]" and rows["wrong, single"] == "50% [37%, 63%]"
    assert "no answers" in rows["generated chosen as real, pairs"] and r.results([]) == {}
    pairs = [answered("pair", "left", side) for side in ("left", "left", "left", "right")]
    assert r.results(pairs)["m"]["generated chosen as real, pairs"].startswith("25% [")
    rounds = [[100 + 10 * i] * 84 + [500] * 60 for i in range(6)] + [[160] * 84 + [170] * 84, [900] * 83]
    seen = [(str(i), ms) for i, shown in enumerate(rounds) for ms in shown]
    flashes = [answered("flash", "real", "real", session=session, exposure_ms=ms) for session, ms in seen]
    rows = r.results([*flashes, answered("flash", "left", "left", session="0", exposure_ms=500)])["m"]
    assert rows["flash that fools, single"] == "130 ms [100, 160], rounds: 7" and rows["rounds"] == "8"
    assert rows["flash that fools, pairs"] == "after 84 flashes in one round"


def test_preferences_are_counted_from_both_sides_and_exported(tmp_path):
    store = JudgementStore(tmp_path / "judgements.sqlite")
    for left, right, answer in (("a", "b", "left"), ("b", "a", "left"), ("b", "a", "right"), ("a", "b", "tie")):
        files = {"pictures": [f"{left}.png", f"{right}.png"]}
        more = {"model": left, "other_model": right, "right": None, "prompt": '"a"\n', "seed": 3, "extra": files}
        store.add(answered("preference", "", answer, **more))
    rows = r.results(store.judgements())
    assert rows["a"]["preferred to b"] == "67% [21%, 94%]: 2 won, 1 ties, 1 lost, p = 1"
    assert "1 won, 1 ties, 2 lost" in rows["b"]["preferred to a"]
    store.export_preferences(tmp_path / "out" / "pairs.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    expected = {"prompt": '"a"\n', "chosen": "a.png", "chosen_model": "a", "chosen_seed": 3}
    assert lines[0] == expected | {"rejected": "b.png", "rejected_model": "b", "rejected_seed": 3}
    assert [line["chosen_model"] for line in lines] == ["a", "b", "a"]


def test_answers_of_many_threads_are_all_kept(tmp_path):
    hostile = ["'); DROP TABLE judgements; --", "nul\0", "\u202eright to left", "😀" * 999, ""]

    def add(name: str) -> None:
        store = JudgementStore(tmp_path / "judged.sqlite")
        for text in hostile:
            store.add(answered("single", "real", "real", session=name, prompt=text))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, "abcd"))
    kept = JudgementStore(tmp_path / "judged.sqlite").judgements()
    assert sorted((j.session, j.prompt) for j in kept) == sorted((name, text) for name in "abcd" for text in hostile)
    assert all(j.time.endswith("+00:00") and j.right for j in kept)


def test_a_file_that_sqlite_cannot_use_is_refused_in_one_line(tmp_path):
    (tmp_path / "text").write_text("prompt,answer\n" * 100)
    with pytest.raises(UserError, match="not a database") as error:
        JudgementStore(tmp_path / "text")
    assert str(tmp_path / "text") in str(error.value) and "\n" not in str(error.value)


SETS = {
    model: [Sample(caption=f"caption {i}", real=f"real/{i}", made=f"{model}/{i}", seed=i) for i in range(11)]
    for model in "ab"
}


@pytest.mark.parametrize("count", [9, 66, 200])
@pytest.mark.parametrize("kind", ANSWERS)
def test_questions_are_balanced_random_and_the_seeds(kind, count):
    sets = SETS if kind == "preference" else {"a": SETS["a"]}
    orders = [questions(kind, count, sets, seed, "s") for seed in range(40)]
    assert orders[0] == questions(kind, count, sets, 0, "s") != orders[1]
    for asked in orders:
        sides = Counter((q.model, q.extra["truth"]) for q in asked)
        assert len(asked) == count and len(sides) == 2 and max(sides.values()) - min(sides.values()) <= 1
        rounds = [asked[i : i + 11] for i in range(0, count, 11)]
        assert all(len({q.prompt for q in part}) == len(part) for part in rounds)  # each before any comes again
        for q in asked:
            assert {p.split("/")[1] for p in q.extra["pictures"]} == {str(q.seed)} and q.prompt == f"caption {q.seed}"
            sources = [Path(p).parts[0] for p in q.extra["pictures"]]
            expected = {"real": ["real"], "generated": ["a"], "left": ["real", "a"], "right": ["a", "real"]}
            assert sources == expected.get(q.extra["truth"], [q.model, q.other_model])
    firsts = Counter((order[0].model, order[0].extra["truth"]) for order in orders)
    assert len(firsts) == 2 and min(firsts.values()) > 8
