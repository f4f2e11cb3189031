"""People judging pictures: the arithmetic against closed forms and simulated judges, the file of their answers."""

import itertools
import json
import math
import random
import sqlite3
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist, mean, stdev

import pytest
import scipy.stats

from ldm.app.human import Staircase, fooling, median_interval, perceptual_threshold, rate_interval, sign_test, win_rate
from ldm.app.questions import Question, questions
from ldm.app.store import LONGEST, Judgement, Store, results
from ldm.config import UserError


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("total", [1, 7, 100, 12345])
def test_rate_interval_equals_scipys(total, level):
    for successes in {0, 1, total // 3, total - 1, total}:
        rate, low, high = rate_interval(successes, total, level)
        expected = scipy.stats.binomtest(successes, total).proportion_ci(level, method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert low <= rate == successes / total <= high


def test_rate_interval_at_its_ends():
    z = NormalDist().inv_cdf(0.975)
    assert rate_interval(0, 10)[1:] == (0, pytest.approx(z**2 / (10 + z**2)))  # closed forms
    assert rate_interval(10, 10)[1:] == (pytest.approx(10 / (10 + z**2)), 1)
    assert all(rate_interval(0, n).low == 0 and rate_interval(n, n).high == 1 for n in range(1, 400))  # not nearly
    rate, low, high = rate_interval(0, 0)
    assert math.isnan(rate) and (low, high) == (0, 1)
    for wrong in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="0 to all"):
            rate_interval(*wrong)


def test_sign_test_equals_scipys():
    for wins, losses in itertools.product(range(0, 40, 3), range(0, 40, 7)):
        expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1
        assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-10)
    assert sign_test(8, 2) == 112 / 1024  # 2 (1 + 10 + 45) / 2^10
    assert sign_test(1800, 2000) == pytest.approx(scipy.stats.binomtest(1800, 3800).pvalue, rel=1e-9)


def test_win_rate_counts_a_tie_half():
    assert win_rate(6, 8, 2)[:3] == rate_interval(10, 16)
    assert win_rate(6, 8, 2).p == sign_test(6, 2) == win_rate(6, 0, 2).p
    assert win_rate(2, 5, 7).rate == pytest.approx(1 - win_rate(7, 5, 2).rate)
    assert win_rate(0, 0, 0)[1:4] == (0, 1, 1)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("count", [6, 7, 20, 51])
def test_median_interval_equals_scipys(count, level):
    values = [random.gauss(300, 50) for _ in range(count)]
    expected = scipy.stats.quantile_test(values).confidence_interval(level)
    found = median_interval(values, level)
    assert found == (pytest.approx(sorted(values)[count // 2], abs=50), expected.low, expected.high)


def test_median_interval_of_few_is_open():
    assert median_interval([3, 1, 2, 5, 4]) == (3, -math.inf, math.inf)  # 2 / 2^5 > 5%
    assert median_interval([3, 1, 2, 5, 4, 6]) == (3.5, 1, 6)
    assert math.isnan(median_interval([]).rate)


def test_staircase_steps():
    ladder = Staircase()
    assert (ladder.exposure, ladder.enough) == (500, 84)
    answers = [True, True, True, True, True, False, True, True, True, False, False]
    for right in answers:
        ladder = ladder.answer(right)
    assert ladder.exposures == [500, 500, 500, 470, 470, 470, 480, 480, 480, 450, 460, 470]
    assert ladder == Staircase.replay(answers) and ladder.exposure == 470
    assert Staircase.replay([False]).exposure == 510 and Staircase.replay([False], longest=500).exposure == 500
    assert Staircase.replay([True] * 140).exposure == 100 and Staircase.replay([False] * 140).exposure == 1000
    one_block = Staircase.replay([True] * 149)
    assert one_block.exposure == 100 and one_block.answer(True).exposure == 500  # the next block begins anew
    assert Staircase.replay([True] * 152).exposure == 500 and Staircase.replay([True] * 153).exposure == 470


def test_staircase_is_hypes():
    """Zhou et al. 2019, section 2.1: range, first exposure, block, steps, and the rule of three up, one down."""
    ladder = Staircase()
    assert (ladder.shortest, ladder.longest, ladder.start, ladder.block) == (100, 1000, 500, 150)
    assert (ladder.up, ladder.down, ladder.streak) == (10, 30, 3)


def test_staircase_at_its_ends_and_before_there_is_enough():
    for right, end in ((True, 100), (False, 1000)):
        assert Staircase.replay([right] * 150).threshold() == end
        assert Staircase.replay([right] * 83).threshold() is None and Staircase.replay([right] * 84).threshold()
    coin = random.Random(0)
    assert Staircase.replay([coin.random() < 0.5 for _ in range(150)]).threshold() > 450  # nothing is seen at any time


def test_a_threshold_is_the_mean_of_the_blocks_modes():
    assert perceptual_threshold([300, 200, 300, 200, 100], 5, 5) == 200
    assert perceptual_threshold([300, 300, 200, 100, 100, 200, 400], 3, 3) == 200  # (300 + 100) / 2; one is too few
    assert perceptual_threshold([300, 300, 400, 400], 1, 2) == 350
    assert perceptual_threshold([], 1, 5) is None and perceptual_threshold([100] * 4, 5, 5) is None


def judged(ladder: Staircase, middle: float, slope: float, count: int, rng: random.Random) -> Staircase:
    """A judge who is right with probability 1/2 + logistic((exposure - middle) / slope) / 2."""
    for _ in range(count):
        seen = 1 / (1 + math.exp((middle - ladder.exposure) / slope))
        ladder = ladder.answer(rng.random() < (1 + seen) / 2)
    return ladder


@pytest.mark.parametrize(
    ("options", "level"),
    [({}, 0.25 ** (1 / 3)), ({"up": 10, "down": 10}, 0.5 ** (1 / 3)), ({"up": 30, "down": 10, "streak": 1}, 0.75)],
)
def test_threshold_of_a_known_judge(options, level):
    ladder, rng = Staircase(block=320, **options), random.Random(0)
    assert ladder.level == pytest.approx(level)
    judges = [judged(ladder, 250, 40, 320, rng) for _ in range(60)]
    exposure = 250 + 40 * math.log((2 * level - 1) / (2 - 2 * level))  # where the judge is right at that level
    assert mean(judge.threshold() for judge in judges) == pytest.approx(exposure, abs=10)
    late = [right for judge in judges for right in judge.answers[-200:]]
    assert mean(late) == pytest.approx(level, abs=0.015)


def test_three_blocks_know_a_judge_better_than_one():
    """HYPE's three blocks of 150: unbiased to a step, and less spread than one."""
    rng = random.Random(0)
    judges = [judged(Staircase(), 250, 40, 450, rng) for _ in range(120)]
    middle = 250 + 40 * math.log((2 * Staircase().level - 1) / (2 - 2 * Staircase().level))
    thrice = [judge.threshold() for judge in judges]
    once = [Staircase.replay(judge.answers[:150]).threshold() for judge in judges]
    assert mean(thrice) == pytest.approx(middle, abs=10) and stdev(thrice) < 0.75 * stdev(once)


def study(judge, seed: int, count: int = 100, kinds=("single", "pair")) -> list[Judgement]:
    """`judge(truth, other)` answers questions about one model."""
    asked = [q for kind in kinds for q in questions(seed, kind, count, {"m": range(30)}, range(100, 130))]
    found = []
    for q in asked:
        other = {"real": "generated", "generated": "real", "left": "right", "right": "left"}[q.truth]
        answer = judge(q.truth, other)
        found.append(Judgement(session="s", kind=q.kind, model=q.model, answer=answer, right=bool(answer == q.truth)))
    return found


def test_a_coin_is_fooled_half_of_the_time_and_its_intervals_hold():
    coin = random.Random(1)
    tables = [results(study(lambda *both: coin.choice(both), seed))["m"] for seed in range(400)]
    for pick in (
        lambda table: table["single"].hype_infinity,
        lambda table: table["single"].fakes,
        lambda table: table["single"].reals,
        lambda table: table["pair"],
    ):
        rates = [pick(table) for table in tables]
        assert mean(rate.rate for rate in rates) == pytest.approx(0.5, abs=0.01)
        assert 0.92 < mean(rate.low <= 0.5 <= rate.high for rate in rates) < 0.98


def test_judges_of_known_skill():
    perfect = results(study(lambda truth, other: truth, 0))["m"]
    assert perfect["single"] == fooling(0, 50, 0, 50) and perfect["pair"] == rate_interval(0, 100)
    assert set(results(study(lambda truth, other: truth, 0))) == {"m"}
    assert perfect["judgements"] == {"single": 100, "pair": 100} and perfect["sessions"] == 1
    gullible = results(study(lambda truth, other: "real", 0, kinds=["single"]))["m"]["single"]
    assert gullible == fooling(50, 50, 0, 50)
    assert [rate.rate for rate in gullible] == [0.5, 1, 0]
    rng = random.Random(0)
    skilled = results(study(lambda *both: both[rng.random() < 0.2], 0, 20_000))["m"]
    assert [rate.rate for rate in (*skilled["single"], skilled["pair"])] == pytest.approx([0.2] * 4, abs=0.01)


def flash(session: str, exposure: int, **other) -> Judgement:
    given = {"kind": "flash", "model": "m", "answer": "real", "right": True} | other
    return Judgement(session=session, exposure_ms=exposure, **given)


def test_thresholds_are_over_sessions_with_enough_flashes():
    found = [flash(f"{i}", 100 + 10 * i) for i in range(8) for _ in range(84 if i < 7 else 83)]
    found += [flash("0", 400, answer="left", right=False) for _ in range(90)]
    table = results(found)["m"]
    assert (table["threshold_ms"], table["thresholds"]) == ((130, 100, 160), 7)
    assert (table["pair_threshold_ms"], table["pair_thresholds"]) == ((400, -math.inf, math.inf), 1)
    assert table["flash_single"].reals == rate_interval(0, 7 * 84 + 83)
    assert table["flash_pair"].rate == 1 and table["sessions"] == 8
    assert math.isnan(table["single"].hype_infinity.rate)


def taste(left: str, right: str, answer: str, /, **other) -> Judgement:
    extra = {"pictures": [f"{left}/1.png", f"{right}/1.png"]}
    values = {"session": "s", "prompt": "a red circle", "seed": 3, "extra": extra} | other
    return Judgement(kind="preference", model=left, other_model=right, answer=answer, **values)


def test_preferences_are_seen_from_both_sides():
    found = [taste("a", "b", "left"), taste("b", "a", "left"), taste("b", "a", "right"), taste("a", "b", "tie")]
    tables = results([*found, taste("c", "a", "left")])
    assert tables["a"]["preference"] == {"b": win_rate(2, 1, 1), "c": win_rate(0, 0, 1)}
    assert tables["b"]["preference"] == {"a": win_rate(1, 1, 2)}
    assert tables["c"]["judgements"] == {"preference": 1}


HOSTILE = ["'); DROP TABLE judgements; --", "nul\0 in it", "\u202eright to left", "\u2028line", "😀" * LONGEST, ""]


def test_round_trip(tmp_path):
    store = Store(tmp_path / "new folder" / "judged.db")
    given = [
        taste("a", "b", "tie", seed=-(2**63), prompt=text, extra={"pictures": [text[:9], "b"]}) for text in HOSTILE
    ]
    given += [
        flash("'", 120, prompt="x", seed=0),
        Judgement(session="s", kind="pair", model="b", answer="left", right=False),
    ]
    kept = [store.add(judgement) for judgement in given]
    assert [(k.kind, k.prompt, k.extra, k.seed) for k in kept] == [(g.kind, g.prompt, g.extra, g.seed) for g in given]
    again = Store(store.path)
    assert again.judgements() == kept
    assert [j.id for j in kept] == [*range(1, 9)] and kept[0].time <= kept[-1].time and "+00:00" in kept[0].time
    assert again.judgements("flash") == again.judgements(session="'") == kept[6:7]
    assert again.judgements(model="b") == [*kept[:6], kept[7]] and again.judgements(model="a") == kept[:6]
    assert again.judgements("pair", "b", "s") == kept[7:]
    assert again.results() == results(kept)


def test_half_characters_are_replaced(tmp_path):
    store = Store(tmp_path / "judged.db")
    store.add(flash("\ud800", 120, prompt="a \udfff"))
    assert [(j.session, j.prompt) for j in store.judgements(session="\ud800")] == [("?", "a ?")]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (flash("s", 120, prompt="x" * 2**20), "prompt has 1,048,576 characters"),
        (flash("s" * 2**20, 120), "session has"),
        (flash("s", 120, extra={"x": "y" * LONGEST}), "extra has"),
        (flash("s", 120, answer="maybe"), "allowed: .'real', 'generated', 'left', 'right'"),
        (flash("s", 120, kind="pair"), "answer 'real' to 'pair'"),
        (flash("s", 120, kind="poll"), "allowed: .'pair', 'single'"),
        (flash("s", None), "a flash has an exposure_ms"),
        (flash("s", 120, kind="single"), "a single has no exposure_ms"),
        (flash("s", 120, right=None), "right=True or False"),
        (flash("s", 120, model=""), "one model"),
        (flash("s", 120, seed=2**63), "64 bits"),
        (taste("a", "a", "left"), "two models"),
        (taste("a", "b", "left", right=True), "no right"),
        (taste("a", "b", "left", extra={"pictures": "ab"}), "the two files"),
    ],
)
def test_what_is_no_answer_is_refused(tmp_path, wrong, says):
    store = Store(tmp_path / "judged.db")
    with pytest.raises(UserError, match=says) as raised:
        store.add(wrong)
    assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)
    assert store.judgements() == []


def at_once(work, names) -> None:
    """Runs `work(name)` in a thread each, all beginning together; raises what one of them raised."""
    start = threading.Barrier(len(names))
    with ThreadPoolExecutor(len(names)) as pool:
        for done in [pool.submit(lambda name=name: (start.wait(), work(name))) for name in names]:
            done.result()


def test_threads_lose_nothing(tmp_path):
    def answer(name: str) -> None:
        store = Store(tmp_path / "judged.db")
        for i in range(200):
            store.add(flash(name, 100, seed=i))

    at_once(answer, "ab")
    found = Store(tmp_path / "judged.db").judgements()
    assert len({j.id for j in found}) == 400
    for name in "ab":
        assert [j.seed for j in found if j.session == name] == [*range(200)]


def test_many_make_the_file_at_once(tmp_path):
    for turn in range(10):
        at_once(lambda name, turn=turn: Store(tmp_path / f"{turn}.db").add(flash(name, 100)), "abcdefgh")
        assert len(Store(tmp_path / f"{turn}.db").judgements()) == 8


def foreign(path, kind: str) -> None:
    if kind == "text":
        path.write_text("prompt,answer\n" * 100)
    elif kind == "folder":
        path.mkdir()
    elif kind == "other program's":
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE judgements (id)")
    elif kind == "other version's":
        Store(path)
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 2")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("text", "file is not a database"),
        ("folder", "unable to open"),
        ("other program's", "a database of something else"),
        ("other version's", "are of version 2, this program's of 1"),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, kind, says):
    path = tmp_path / "judged.db"
    foreign(path, kind)
    before = path.is_file() and path.read_bytes()
    with pytest.raises(UserError, match=says) as raised:
        Store(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert before == (path.is_file() and path.read_bytes())


def test_a_read_only_file_is_refused_at_once(tmp_path, monkeypatch):
    path, connect = tmp_path / "judged.db", sqlite3.connect
    kept = Store(path).add(flash("s", 100))
    # as SQLite has it for a user who may not write (root may)
    monkeypatch.setattr(sqlite3, "connect", lambda p, **how: connect(f"file:{p}?mode=ro", uri=True, **how))
    with pytest.raises(UserError, match="readonly database"):
        Store(path)
    monkeypatch.undo()
    assert Store(path).judgements() == [kept]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder of .* cannot be made"):
        Store(tmp_path / "file" / "judged.db")


def test_export_of_preferences(tmp_path):
    store = Store(tmp_path / "judged" / "judged.db")
    elsewhere = {"pictures": ["a/1.png", str(tmp_path / "b" / "2.png")], "other_seed": 7}
    for judgement in (
        taste("a", "b", "left", prompt='"quoted"\n\u2028'),
        taste("a", "b", "tie"),
        taste("a", "b", "right", extra=elsewhere),
        flash("s", 100),
    ):
        store.add(judgement)
    assert store.export_preferences(tmp_path / "out" / "pairs.jsonl") == 2
    lines = (tmp_path / "out" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    first = {"prompt": '"quoted"\n\u2028', "chosen": "a/1.png", "rejected": "b/1.png"}
    second = {"prompt": "a red circle", "chosen": "../b/2.png", "rejected": "a/1.png"}
    assert [json.loads(line) for line in lines] == [
        first | {"chosen_model": "a", "chosen_seed": 3, "rejected_model": "b", "rejected_seed": 3},
        second | {"chosen_model": "b", "chosen_seed": 7, "rejected_model": "a", "rejected_seed": 3},
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pairs.jsonl"]


REALS = [("real", i) for i in range(11)]
MODELS = {name: [(name, i) for i in range(11)] for name in "abc"}


def even(values, of: int) -> bool:
    """Whether `of` different things occur as often, plus or minus 1."""
    counts = Counter(values).values()
    return len(counts) == of and max(counts) - min(counts) <= 1


def shown_evenly(shown: list, pool: list) -> bool:
    """Whether none was shown twice before all of the pool were."""
    rounds = [shown[i : i + len(pool)] for i in range(0, len(shown), len(pool))]
    return all(len(set(part)) == len(part) for part in rounds)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [66, 200])
def test_single_pictures_are_balanced(seed, count):
    asked = questions(seed, "single", count, MODELS, REALS)
    assert len(asked) == count and even((q.model for q in asked), 3)
    for name, pool in MODELS.items():
        mine = [q for q in asked if q.model == name]
        assert even((q.truth for q in mine), 2)
        assert {q.pictures[0][0] for q in mine if q.truth == "generated"} == {name}
        assert shown_evenly([q.pictures[0] for q in mine if q.truth == "generated"], pool)
    reals = [q.pictures[0] for q in asked if q.truth == "real"]
    assert shown_evenly(reals, REALS) and set(reals) == set(REALS)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [9, 66, 200])
def test_pairs_are_balanced(seed, count):
    asked = questions(seed, "pair", count, MODELS, REALS)
    assert len(asked) == count and even((q.model for q in asked), 3)
    for q in asked:
        real, generated = q.pictures if q.truth == "left" else q.pictures[::-1]
        assert real[0] == "real" and generated == (q.model, real[1])
    for name, pool in MODELS.items():
        mine = [q for q in asked if q.model == name]
        assert even((q.truth for q in mine), 2)
        assert shown_evenly([p for q in mine for p in q.pictures if p[0] == name], pool)
    assert shown_evenly([p for q in asked for p in q.pictures if p[0] == "real"], REALS)


@pytest.mark.parametrize("seed", range(5))
def test_preferences_are_balanced(seed):
    asked = questions(seed, "preference", 66, MODELS)
    assert even((tuple(sorted((q.model, q.other_model))) for q in asked), 3)
    for first, second in itertools.combinations(MODELS, 2):
        mine = [q for q in asked if {q.model, q.other_model} == {first, second}]
        assert even((q.model for q in mine), 2)
        assert shown_evenly([q.pictures[0][1] for q in mine], REALS)
    assert all([p[0] for p in q.pictures] == [q.model, q.other_model] and q.truth is None for q in asked)
    assert all(q.pictures[0][1] == q.pictures[1][1] for q in asked)
    assert shown_evenly([q.pictures[0][1] for q in asked], REALS)


def test_the_order_is_random_and_the_seeds():
    orders = [questions(seed, "pair", 30, MODELS, REALS) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    longer = [questions(seed, "single", 40, {"m": MODELS["a"]}, REALS) for seed in range(200)]
    for place in range(40):  # no place is always of one kind, nor does one tell of the next
        assert 0.35 < mean(order[place].truth == "real" for order in longer) < 0.65
    assert mean(a.truth == b.truth for order in longer for a, b in itertools.pairwise(order)) == pytest.approx(
        0.49, abs=0.02
    )
    ones = [questions(seed, "single", 1, {"m": ["x.png"]}, ["y.png"])[0] for seed in range(200)]
    fake, real = (
        Question(kind="single", model="m", pictures=(picture,), truth=truth)
        for picture, truth in (("x.png", "generated"), ("y.png", "real"))
    )
    assert all(one in (fake, real) for one in ones) and 70 < ones.count(real) < 130


@pytest.mark.parametrize(
    ("kind", "models", "reals", "says"),
    [
        ("poll", MODELS, REALS, "no questions of kind 'poll'"),
        ("single", {}, REALS, "need real pictures"),
        ("single", MODELS, [], "need real pictures"),
        ("pair", {"a": []}, REALS, "need real pictures"),
        ("preference", {"a": [1]}, [], "two models"),
        ("pair", MODELS, REALS[:5], "as many pictures on all sides, not 11, 11, 11, 5"),
    ],
)
def test_questions_need_pictures(kind, models, reals, says):
    with pytest.raises(UserError, match=says):
        questions(0, kind, 3, models, reals)
