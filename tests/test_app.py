"""What the page does, without a browser: bounds, previews, stops, settings in PNGs, studies; and the server itself."""

import html
import os
import threading
import warnings
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_parts

pytest.importorskip("gradio")

import gradio as gr

from ldm.app import desk as desks
from ldm.app import looking, pools, studio, tab_between, tab_compare, tab_edit, tab_judge, tab_make, tables
from ldm.app.desk import Desk
from ldm.app.page import to_edit
from ldm.app.parts import OWN, controls, figures, number, said
from ldm.app.store import Store
from ldm.app.studio import LONGEST, Models, Settings, about_picture, make, restore
from ldm.app.study import ANSWERS, begin, caption_of, judge
from ldm.config import UserError
from ldm.data import DataConfig
from ldm.images import read_metadata, save_png
from ldm.pipeline import Pipeline

SKIP = gr.skip()
PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny_parts())


@pytest.fixture(scope="module")
def shapes() -> Models:
    return offered("shapes")


def settings(**changes) -> Settings:
    return Settings(**{"model": "tiny", "prompt": PROMPT, "steps": 6, "count": 2, "seed": 5} | changes)


def offered(*names: str, **options) -> Models:
    return Models({name: name for name in names}, **options)


def pixels(image) -> np.ndarray:
    return np.asarray(image, np.int16)


def test_updates_end_with_the_pipelines_own_pictures(pipe, monkeypatch):
    monkeypatch.setattr(studio, "PREVIEW_EVERY", 0.0)
    found = list(make(pipe, settings(), threading.Event()))
    assert [u.step for u in found] == [1, 2, 3, 4, 5, 6, 6] and [u.done for u in found] == [False] * 6 + [True]
    previews = [pixels(u.images[0]) for u in found[:5]]
    assert all(len(u.images) == 2 for u in found[:5]) and len({p.tobytes() for p in previews}) == 5
    own = pipe([PROMPT] * 2, steps=6, guidance=3.0, seed=5)
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(found[-1].images, own, strict=True))


def test_previews_are_few_where_steps_are_quick(pipe, monkeypatch):
    monkeypatch.setattr(studio, "PREVIEW_EVERY", 1e9)
    assert [len(u.images) for u in make(pipe, settings(), threading.Event())] == [0] * 6 + [2]


def test_a_stop_stops_within_a_step_and_going_away_too(pipe):
    stop, found = threading.Event(), []
    for update in make(pipe, settings(steps=100), stop):
        found.append(update)
        if update.step == 3:
            stop.set()
    assert found[-1].stopped and not found[-1].images and found[-1].step < 100
    reader = make(pipe, settings(steps=100), threading.Event())
    next(reader)
    reader.close()  # does not wait: who else uses the page must not either
    for thread in [t for t in threading.enumerate() if t.name == "sampling"]:
        thread.join(60)
        assert not thread.is_alive()
    studio.ENDING.set()  # as the program does at its end
    assert [u.stopped for u in make(pipe, settings(steps=100), threading.Event())] == [True]
    studio.ENDING.clear()
    waiting = threading.Event()
    waiting.set()  # stopped before its turn came
    assert [(u.stopped, u.step) for u in make(pipe, settings(steps=100), waiting)] == [(True, 0)]
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())
    again = threading.Event()  # an event that was not set serves for more than one sampling
    assert [list(make(pipe, settings(steps=2), again))[-1].done for _ in range(2)] == [True, True]


def test_mistakes_of_the_model_and_cut_prompts_are_said(pipe):
    with pytest.raises(UserError, match="multiples of"):
        list(make(pipe, settings(width=17), threading.Event()))
    with pytest.raises(UserError, match="is more than 64x64"):
        list(make(pipe, settings(width=128, height=16), threading.Event()))
    with pytest.raises(UserError, match="2 pictures of that size are too many at once; at most 1"):
        list(make(pipe, settings(width=64, height=64), threading.Event()))
    (*_, last) = make(pipe, settings(prompt=PROMPT * 9), threading.Event())
    assert last.done and len(last.notes) == 1 and "was cut off" in last.notes[0]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"prompt": "x" * (LONGEST + 1)}, "the prompt has 1,001 characters; at most 1,000"),
        ({"negative_prompt": "x" * 10**6}, "the negative prompt has 1,000,000 characters"),
        ({"steps": 0}, "steps is 0; it must be from 1 to 150"),
        ({"steps": 10**9}, "steps is 1000000000"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"count": 17}, "count is 17"),
        ({"width": 4096}, "width is 4096"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        ({"sampler": "../etc"}, "unknown sampler"),
    ],
)
def test_settings_out_of_bounds_are_refused_by_name(values, words):
    with pytest.raises(UserError, match=words) as caught:
        settings(**values)
    assert len(str(caught.value)) < 200


def test_prompts_are_cleaned_and_messages_are_text():
    assert settings(prompt="a\0b\n\tc \ud800").cleaned().prompt == "a b c ?"
    assert "<script>" not in said("<script>alert(1)</script>") and "&lt;script&gt;" in said("<script>")


@pytest.mark.parametrize(
    "text, words",
    [
        ("no model in '/home/me/my models/mine'", "No model in 'mine'"),
        ("'/srv/a/unet/config.json' is missing", "'config.json' is missing"),
        ("cannot read /srv/a/b.json: no", "Cannot read b.json: no"),
        ("'/srv/a/' is no folder", "'a' is no folder"),
        ("see https://example.org/a/b, at 3/4 or runs/mine", "See https://example.org/a/b, at 3/4 or runs/mine"),
        ("", ""),
    ],
)
def test_messages_are_sentences_without_the_paths_of_the_machine(text, words):
    assert html.unescape(said(text, wrong=True)) == f'<p role="status" class="wrong">{words}</p>'


def test_running_out_of_memory_is_said(pipe, monkeypatch):
    monkeypatch.setattr(Pipeline, "__call__", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(UserError, match="not enough memory"):
        list(make(pipe, settings(), threading.Event()))


def test_models_are_found_and_folders_elsewhere_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/one", "runs/two/diffusion"):
        Path(run).mkdir(parents=True)
        Path(run, "model_index.json").touch()
    assert studio.find_models([]) == {n: n for n in ("emoji", "shapes", "runs/one", "runs/two/diffusion")}
    given = ["emoji", "/home/me/sd", "/home/you/sd", "runs/one", "../sd"]
    names = ["emoji", "sd", "sd (2)", "runs/one", "sd (3)"]
    assert studio.find_models(given) == dict(zip(names, given, strict=True))


def test_models_are_those_that_are_offered(shapes):
    assert shapes["shapes"] is shapes["shapes"]
    for name in ("../../etc", "emoji", "", "/etc/passwd" * 100):
        with pytest.raises(UserError, match="there is no model .* known: shapes$"):
            shapes[name]


def test_only_the_last_models_stay_open(monkeypatch):
    opened = []
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda name, device: opened.append(name) or name)
    models = offered("a", "b", "c", "a", keep=2)
    assert models.names == ["a", "b", "c"]
    [models[name] for name in "abacab"]
    assert opened == ["a", "b", "c", "b"]


def test_a_png_says_all_that_making_it_again_takes(pipe, tmp_path):
    models = offered("tiny")
    first = settings(
        negative_prompt="blau <b>", guidance=2.5, guidance_rescale=0.3, sampler="euler", width=32, height=16
    )
    (*_, last) = make(pipe, first, threading.Event())
    save_png(last.images[1], tmp_path / "a.png", about_picture(pipe, first, 1))
    again, notes = restore(tmp_path / "a.png", models)
    assert notes == [] and again == studio.changed(first, seed=6, count=1)
    (*_, other) = make(pipe, again, threading.Event())
    assert abs(pixels(other.images[0]) - pixels(last.images[1])).max() <= 1
    own, _ = restore(tmp_path / "a.png", offered("other"))
    assert own.model == "other"


def test_pngs_that_say_nothing_or_nonsense_are_refused(tmp_path):
    models = offered("tiny")
    plain = Image.new("RGB", (4, 4))
    plain.save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("not a picture")
    plain.save(tmp_path / "photo.png", "JPEG")
    for name in ("plain.png", "text.png", "photo.png", "gone.png"):
        with pytest.raises(UserError, match="PNG"):
            restore(tmp_path / name, models)
    for key, value in (
        ("steps", "many"),
        ("seed", "1e999"),
        ("guidance", "99"),
        ("sampler", "rm -rf"),
        ("prompt", "x" * 5000),
    ):
        save_png(plain, tmp_path / "bad.png", {"prompt": "a", "seed": "1", "model": "tiny", key: value})
        with pytest.raises(UserError, match=key):
            restore(tmp_path / "bad.png", models)


def test_controls_give_settings_and_show_them():
    import gradio as gr

    with gr.Blocks():
        given = controls(offered("tiny", "other"))
    shown = given.show(settings(model="other", sampler=""))
    assert shown[given.names.index("sampler")] == OWN and len(shown) == len(given.inputs)
    assert given.read(tuple(shown)) == settings(model="other")
    drawn = {given.read((*shown[:-1], True)).seed for _ in range(4)}
    assert len(drawn) == 4  # the last one says that the seed is to be drawn


def test_the_desk_gives_out_only_its_own_pictures(tmp_path):
    desk = Desk(models=offered("tiny"), folder=tmp_path / "app")
    (tmp_path / "app/served/1").mkdir(parents=True)
    (tmp_path / "app/served/1/image.png").touch()
    path = desk.keep(Image.new("RGB", (4, 4)), {"prompt": "a", "seed": "1"})
    assert desk.own(path) == path and read_metadata(desk.keep(Image.new("RGB", (4, 4)), {"prompt": "a", "seed": "1"}))
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "app/pictures/link.png").symlink_to(tmp_path / "x.png")
    for bad in (
        "/etc/passwd",
        str(tmp_path / "x.png"),
        f"{tmp_path}/app/../x.png",
        str(tmp_path / "app/pictures/link.png"),
        str(tmp_path / "app/served/1/image.png"),  # a preview
    ):
        with pytest.raises(UserError, match="no longer here"):
            desk.own(bad)


def test_names_of_pictures_say_what_they_are_of(tmp_path):
    desk = Desk(models=offered("tiny"), folder=tmp_path)
    image = Image.new("RGB", (4, 4))
    for prompt, start in (
        ("A red circle, 2!", "a-red-circle-2-7-"),
        ("../../etc", "etc-7-"),
        ("🟥", "7-"),
        ("x" * 999, "x" * 40),
    ):
        name = Path(desk.keep(image, {"prompt": prompt, "seed": "7"})).name
        assert name.startswith(start) and desk.still_there([name]) == [name]


def test_only_the_newest_pictures_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(desks, "MOST", 3)
    desk = Desk(models=offered("tiny"), folder=tmp_path)
    (tmp_path / "pictures").mkdir()
    other = tmp_path / "pictures" / "mine.png"
    other.touch()  # not of the page
    kept = []
    for i in range(5):
        kept.append(Path(desk.keep(Image.new("RGB", (4, 4)), {"prompt": "a", "seed": "1"})))
        os.utime(kept[-1], (1000 + i, 1000 + i))
    assert [file.is_file() for file in kept] == [False, False, True, True, True] and other.is_file()


def test_a_history_is_what_is_still_there(tmp_path):
    desk = Desk(models=offered("tiny"), folder=tmp_path)
    making = tab_make.Making(desk, None)
    first, second = (Path(desk.keep(Image.new("RGB", (4, 4)), {"prompt": "a", "seed": "1"})) for _ in range(2))
    (tmp_path / "secret.png").touch()
    names, files = making.past([second.name, first.name, "../secret.png", str(first), f"{'0' * 32}.png", 3, None])
    assert names == [second.name, first.name] and files == [str(second), str(first)]
    for nonsense in (None, "names", {"a": 1}, 5):
        assert making.past(nonsense) == ([], [])
    assert len(making.past([first.name] * 1000)[0]) == tab_make.KEPT


def test_a_stop_is_for_work_that_runs_or_waits(tmp_path):
    from types import SimpleNamespace

    desk = Desk(models=offered("tiny"), folder=tmp_path)
    me, you = (SimpleNamespace(session_hash=name) for name in "ab")
    begin_it, stop_it = desk.arm("make"), desk.stop("make", desks.IDLE)
    assert "Nothing is running" in stop_it(me)
    begin_it(me)
    with desk.working(me, "make") as event:
        begin_it(me)  # a second click begins nothing, and the first one's work can still be stopped
        assert "Nothing is running" in stop_it(you) and not event.is_set()
        assert stop_it(me) == SKIP and event.is_set()
    assert "Nothing is running" in stop_it(me)
    begin_it(me)
    assert stop_it(me) == SKIP  # it waits in the queue
    with desk.working(me, "make") as event:
        assert event.is_set()
    begin_it(me)
    with desk.working(me, "make") as event:
        assert not event.is_set()
        desk.forget(me)
        assert event.is_set() and not desk.stops


def test_number_fields_are_read_or_refused():
    assert (number(None, "seed"), number("", "seed"), number(7.0, "seed"), number(2, "guidance", float)) == (
        0,
        0,
        7,
        2.0,
    )
    for value in ("many", float("inf"), float("nan"), [1], 2.5):
        with pytest.raises(UserError, match="guidance rescale is .* no whole number"):
            number(value, "guidance_rescale")
    with pytest.raises(UserError, match="guidance is .* no number"):
        number("many", "guidance", float)


def test_figures_have_their_labels_as_text():
    html = figures([(Image.new("RGB", (8, 8)), "<b>"), (Image.new("RGB", (512, 8)), "two")])
    assert html.count("<figure>") == 2 and "&lt;b&gt;</figcaption>" in html and "<b>" not in html
    assert html.count('class="coarse"') == html.count('class="fine"') == 1


def test_comparisons_are_read_from_a_list():
    models = offered("a", "b")
    found = tab_compare.variants(settings(), "guidance", "1, 2.5,, 2.5", models)
    assert [(label, s.guidance) for label, s in found] == [("guidance 1", 1.0), ("guidance 2.5", 2.5)]
    assert [s.model for _, s in tab_compare.variants(settings(), "model", "", models)] == ["a", "b"]
    for axis, text, words in (
        ("guidance", "", "0 values"),
        ("steps", "1,2,3,4,5,6,7,8,9", "9 values"),
        ("steps", "ten", "'ten' is no value of steps"),
        ("sampler", "none", "unknown sampler"),
        ("model", "/etc", "there is no model"),
        ("prompt", "x", "cannot compare over"),
    ):
        with pytest.raises(UserError, match=words):
            tab_compare.variants(settings(), axis, text, models)


def test_a_drawing_becomes_a_picture_and_a_mask():
    background = Image.new("RGBA", (300, 200), (0, 0, 255, 255))
    layer = Image.new("RGBA", (300, 200))
    layer.paste((255, 0, 0, 255), (50, 0, 150, 200))  # the left half of the centre square
    image, mask = tab_edit.read_drawing({"background": background, "layers": [layer]}, 16, 4)
    assert image.size == (16, 16) and image.getpixel((3, 3)) == (0, 0, 255)
    assert np.array_equal(np.asarray(mask), np.tile(np.arange(16) < 8, (16, 1)))
    dot = Image.new("RGBA", (300, 200))
    dot.paste((255, 0, 0, 255), (150, 100, 160, 110))  # less than a latent, which is drawn whole
    _, mask = tab_edit.read_drawing({"background": background, "layers": [dot]}, 16, 4)
    assert np.argwhere(mask).min(0).tolist() == [8, 8] and np.argwhere(mask).max(0).tolist() == [11, 11]
    assert tab_edit.read_drawing({"background": background, "layers": []}, 16, 4)[1] is None
    for nothing in (None, {}, {"background": None}, {"background": Image.new("RGBA", (9, 9))}):
        with pytest.raises(UserError, match="no picture to begin with"):
            tab_edit.read_drawing(nothing, 16, 4)


def test_an_editors_margins_are_no_part_of_the_picture():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8))
    alone, _ = tab_edit.read_drawing({"background": image}, 16, 4)
    for place, size in (((156, 0), (512, 300)), ((0, 17), (200, 333))):
        canvas = Image.new("RGBA", size)
        canvas.paste(image, place)
        assert tab_edit.read_drawing({"background": canvas}, 16, 4)[0] == alone
    # a picture's own transparency is white, wherever it is
    star = Image.new("RGBA", (64, 64))
    star.paste((255, 0, 0, 255), (20, 10, 30, 30))
    drawn = np.asarray(tab_edit.read_drawing({"background": star}, 64, 8)[0])
    assert (drawn[10:30, 20:30] == (255, 0, 0)).all() and drawn[40, 40].tolist() == [255, 255, 255]


def test_what_make_hands_to_edit_comes_back_exactly(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    path = tmp_path / "it.png"
    save_png(image, path, {"prompt": "a", "negative_prompt": "b", "model": "other", "seed": "3"})
    _, drawn, *told = tab_edit.handed(str(path), offered("tiny", "other"))
    assert told == ["a", "b", "other"] and drawn["background"].size == (512, 512)
    assert tab_edit.read_drawing(drawn, 32, 4)[0] == image
    said, *rest = to_edit(offered("tiny"), None)
    assert "no picture to edit yet" in said and len(rest) == 6


def test_between_two_prompts_the_ends_are_the_prompts_own_pictures(pipe):
    a, b = settings(count=3, seed=1), settings(prompt="a blue square", seed=9)
    options = tab_between.on_the_way(pipe, a, b, [0.0, 0.4, 1.0])
    (*_, last) = make(pipe, a, threading.Event(), **options)
    for image, s in ((last.images[0], a), (last.images[2], b)):
        (own,) = pipe(s.prompt, steps=6, guidance=3.0, seed=s.seed)
        assert abs(pixels(image) - pixels(own)).max() <= 1
    with pytest.raises(UserError, match="two prompts"):
        tab_between.on_the_way(pipe, a, settings(prompt=" "), [0.5])


def test_attention_of_words_is_a_distribution_over_tokens(pipe):
    with looking.attention(pipe) as seen:
        pipe(PROMPT, steps=2, guidance=3.0)
    maps = torch.stack(seen)
    assert maps.shape[1:] == (12, 8, 8) and len(seen) % 2 == 0
    torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]))
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


def test_words_have_the_places_of_their_tokens(pipe):
    found = looking.words_of(pipe.tokenizer, "a red   circlecircle")
    ids = pipe.tokenizer.encode("a red circlecircle")
    assert [word for word, _ in found] == ["a", "red", "circlecircle"]
    assert [place for _, places in found for place in places] == list(range(1, len(ids) - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(looking.words_of(pipe.tokenizer, "red " * 40)) < 12


def test_a_word_looks_where_its_object_is(shapes):
    """On the shipped model: the noun's map is brighter on its object than on the other one."""
    ask = Settings(model="shapes", prompt=PROMPT, steps=12, seed=0)
    *told, inside = looking.watch(shapes["shapes"], ask, threading.Event())
    assert [(u.step, u.steps) for u in told] == [(i + 1, 12) for i in range(12)] and len(inside.way) == looking.STRIP
    picture, heat = pixels(inside.image), dict(inside.words)
    red, blue = picture[..., 0] > 180, picture[..., 2] > 180
    assert red.sum() > 20 and blue.sum() > 20
    assert heat["circle"][red].mean() > heat["circle"][blue].mean() + 0.2
    assert heat["square"][blue].mean() > heat["square"][red].mean() + 0.2
    assert all(m.min() == 0 and m.max() == 1 for m in heat.values())
    bright = looking.overlay(inside.image, np.ones((32, 32)))
    assert pixels(bright).mean() > pixels(looking.overlay(inside.image, np.zeros((32, 32)))).mean() + 20
    html = looking.schedule_plots(shapes["shapes"].schedule, "ddim", 12)
    assert html.count("<svg") == 2 and "the 12 steps" in html


@pytest.fixture(scope="module")
def pool(shapes, tmp_path_factory) -> tuple[pools.Pool, Path]:
    folder = tmp_path_factory.mktemp("app")
    data = DataConfig(name="shapes")
    *updates, found = pools.prepare(shapes, "shapes", data, 10, 0, folder, threading.Event())
    assert [u.step for u in updates] == sorted(u.step for u in updates) and updates[-1].step == updates[-1].steps
    assert [type(f) for f in pools.prepare(shapes, "shapes", data, 10, 0, folder, threading.Event())] == [pools.Pool]
    return found, folder


def test_a_pool_has_real_and_made_pictures_of_the_same_captions(pool, shapes):
    found, folder = pool
    assert len(found.real) == len(found.made) == len(found.captions) == 10 and found.seeds == list(range(10))
    about = read_metadata(found.made[9])
    assert about["prompt"] == found.captions[9] and about["seed"] == "9"
    (own,) = shapes["shapes"](found.captions[9], seed=9, guidance=3.0)
    assert abs(pixels(own) - pixels(Image.open(found.made[9]))).max() <= 1
    assert all(file.is_relative_to(folder) for file in (*found.real, *found.made))
    assert pools.data_of("shapes", shapes["shapes"]).name == "shapes"


def test_a_stopped_preparation_ends_without_a_pool(shapes, tmp_path):
    stop = threading.Event()
    stop.set()
    found = list(pools.prepare(shapes, "shapes", DataConfig(name="shapes"), 10, 1, tmp_path, stop))
    assert not any(isinstance(f, pools.Pool) for f in found)


@pytest.mark.parametrize("kind, flash", [("single", False), ("single", True), ("pair", False), ("pair", True)])
def test_a_study_runs_from_its_questions_to_the_results(pool, tmp_path, kind, flash):
    """A judge who is always right is never fooled; one who is always wrong, always."""
    found, folder = pool
    store = Store(tmp_path / "judgements.sqlite")
    for wrong in (False, True):
        study = begin(kind, flash, 20, {"shapes": found}, seed=3)
        while (question := study.question) is not None:
            html = tab_judge.ask(study)
            assert html.count("<img") == len(question.pictures) and str(folder) not in html
            told = "the last answer was " + ("wrong" if wrong else "right")
            assert (told in html) == (flash and study.at > 0)  # HYPE tells
            assert ("shown for" in html) == flash and f"{study.at + 1} of 20" in html
            answers = [a for a in ANSWERS[kind] if a]
            answer = next(a for a in answers if (a == question.truth) != wrong)
            kept = judge(study, answer, folder, store)
            assert kept.right != wrong and (kept.exposure_ms is not None) == flash
        with pytest.raises(UserError, match="no question"):
            judge(study, answer, folder, store)
        assert "last one" in tab_judge.ask(study)
        assert (study.staircase.exposure < 500) == (flash and not wrong)
    result = store.results()["shapes"]
    name = ("flash_" if flash else "") + kind
    rate = result[name].hype_infinity if kind == "single" else result[name]
    assert rate.rate == 0.5 and result["judgements"] == {"flash" if flash else kind: 40}
    assert ("50% [" in tables.table(store.results())) != flash  # what a staircase sets is no result


def test_a_flash_is_answered_after_it_was_seen_and_the_staircase_goes_on(pool, tmp_path):
    found, folder = pool
    study = begin("single", True, 4, {"shapes": found}, 0, "me", [True] * 6)
    assert study.session == "me" and study.staircase.exposure == 440 and study.wait == pytest.approx(1.34)
    assert begin("single", False, 4, {"shapes": found}, 0).wait == 0
    store = Store(tmp_path / "judgements.sqlite")
    store.add = lambda judgement: (_ for _ in ()).throw(UserError("the disk is full"))
    with pytest.raises(UserError, match="full"):
        judge(study, "real", folder, store)
    assert study.at == 0 and len(study.staircase.answers) == 6  # what was not kept was not answered


def test_a_visit_goes_on_after_a_reload_but_no_flash_is_seen_twice(pool, tmp_path):
    found, folder = pool
    judging = tab_judge.Judging(Desk(models=offered("shapes"), folder=folder))
    for nonsense in (None, 3, "", "0" * 11, "../../secret", ["0" * 12]):
        name, *rest = judging.visit(nonsense)
        assert len(name) == 12 and int(name, 16) >= 0 and rest == [SKIP] * 4
    (who, *_), shown = judging.visit(None), lambda: judging.visit(who)[1]
    judging.studies[who] = begin("single", False, 4, {"shapes": found}, 0, who)
    assert judging.visit(who)[0] == who and "(1 of 4)" in shown()
    judging.answered(0, who)
    assert "(2 of 4)" in shown() and judging.studies[who].at == 1
    assert len(judging.answered(0, "f" * 12)) == len(judging.answered(0, who)) == 7  # somebody else has no question
    for _ in range(2):
        *_, opened, report, _ = judging.answered(0, who)
    assert opened.open and "single" in report  # after the last one
    judging.studies[who] = begin("single", True, 4, {"shapes": found}, 0, who)
    assert shown() == SKIP


def test_preferences_name_the_files_that_were_shown(pool, tmp_path):
    found, folder = pool
    store = Store(folder / "judgements.sqlite")
    study = begin("preference", False, 6, {"one": found, "two": found}, seed=0)
    sides = []
    while (question := study.question) is not None:
        assert question.truth is None and caption_of(study, question) in tab_judge.ask(study).replace("&#x27;", "'")
        sides.append((question.model, question.other_model))
        judge(study, "left" if question.model == "one" else "right", folder, store)
    assert {("one", "two"), ("two", "one")} == set(sides)
    win = store.results()["one"]["preference"]["two"]
    assert (win.wins, win.losses) == (6, 0)
    assert store.export_preferences(tmp_path / "p.jsonl") == 6


def test_a_picture_between_prompts_is_not_taken_for_one_prompts_own(tmp_path):
    about = {"prompt": "a -> b", "seed": "1", "model": "tiny", "share": "0.5", "seed_to": "2"}
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", about)
    with pytest.raises(UserError, match="lies between two prompts"):
        restore(tmp_path / "a.png", offered("tiny"))
    save_png(
        Image.new("RGB", (4, 4)), tmp_path / "b.png", {"prompt": "a", "seed": "1", "model": "tiny", "compared": "steps"}
    )
    assert restore(tmp_path / "b.png", offered("tiny"))[1] == [
        "compared over steps: these are the settings that they share"
    ]


def test_the_page_and_its_server_stay_on_this_machine(tmp_path, monkeypatch):
    from fastapi.testclient import TestClient

    from ldm.app.serve import application

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    secret = tmp_path / "elsewhere" / "secret.png"
    secret.parent.mkdir()
    save_png(Image.new("RGB", (4, 4)), secret, {"prompt": "a secret", "seed": "1"})
    app = tmp_path / "app"
    client = TestClient(application(offered("shapes"), app, hosts=["testserver"]))
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert (app / "judgements.sqlite").is_file()
    kept = Desk(models=offered("shapes"), folder=app).keep(Image.new("RGB", (4, 4)), {"prompt": "a", "seed": "1"})
    served = client.get(f"/gradio_api/file=/page/pictures/{Path(kept).name}")
    assert served.status_code == 200 and served.content == Path(kept).read_bytes()
    for path in (
        "/etc/passwd",
        str(secret),
        f"{app}/judgements.sqlite",
        "/page/judgements.sqlite",
        "/page/../elsewhere/secret.png",
    ):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
        # as if it had been uploaded
        data = {"path": path, "meta": {"_type": "gradio.FileData"}}
        answer = client.post("/gradio_api/run/dropped", json={"data": [data]})
        assert answer.status_code >= 400 and "a secret" not in answer.text
    assert not [file for file in (tmp_path / "served").rglob("*") if file.is_file()]


def test_no_path_of_the_machine_leaves_and_files_are_found_by_other_names(tmp_path, monkeypatch):
    from fastapi import FastAPI, Request, Response
    from fastapi.middleware.gzip import GZipMiddleware
    from fastapi.responses import StreamingResponse
    from fastapi.testclient import TestClient

    from ldm.app.veil import Veil

    uploads, folder, here = tmp_path / "up loads", tmp_path / "app ö", str(Path.cwd())
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    app, heard = FastAPI(), []
    app.add_middleware(GZipMiddleware, minimum_size=1)

    @app.get("/text")
    def text():
        return {"path": f"{folder}/a.png", "url": f"/file={quote(str(uploads))}/b.png", "said": f"{here}/c is missing"}

    @app.get("/stream")
    def stream():
        parts = (f"data: {folder}/{i}.png\n\n" for i in range(3))
        return StreamingResponse(parts, media_type="text/event-stream")

    @app.get("/bytes")
    def bytes_():
        return Response(str(folder).encode(), media_type="image/png")

    @app.post("/api/{rest:path}")
    async def api(request: Request):
        heard.append((request.url.path, await request.json()))

    @app.get("/{rest:path}")
    def file(request: Request):
        heard.append(request.scope["path"])

    client = TestClient(Veil(app, folder))
    answer = client.get("/text")
    assert answer.json() == {"path": "/page/a.png", "url": "/file=/uploads/b.png", "said": "./c is missing"}
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert client.get("/stream").text == "".join(f"data: /page/{i}.png\n\n" for i in range(3))
    assert client.get("/bytes").content == str(folder).encode()
    assert Veil(app, folder).veiled(f"{folder}er {here}-x {here}".encode()) == f"{folder}er {here}-x .".encode()
    compressed = client.get("/text", headers={"Accept-Encoding": "gzip"})  # or the paths in it could not be found
    assert compressed.json() == answer.json() and "content-encoding" not in compressed.headers
    client.get("/gradio_api/file=/page/pictures/x.png")
    client.get("/gradio_api/file=/uploads/y z.png")
    client.get("/page/x.png")  # not asked for as a file
    assert heard == [f"/gradio_api/file={folder}/pictures/x.png", f"/gradio_api/file={uploads}/y z.png", "/page/x.png"]
    sent = {"data": [{"path": "/page/pictures/x.png"}, "/page/x.png", None], "event_data": {"path": "/etc/passwd"}}
    client.post("/api/x", json=sent)
    assert heard[-1] == ("/api/x", sent | {"data": [{"path": f"{folder}/pictures/x.png"}, "/page/x.png", None]})
    assert Veil(app, folder).asked(b"{") == b"{"  # for the page to refuse
