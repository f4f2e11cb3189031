"""The page without a browser: sampling, settings in PNGs, edits, attention maps, judging; and the server's answers."""

import socket
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("gradio")

import gradio as gr
from gradio_client import Client
from gradio_client.exceptions import AppError

from ldm import compilation
from ldm.app import picture_sets, sampling, study, tab_judge, tabs
from ldm.app.attention import attention_maps, token_positions, word_overlays
from ldm.app.judgements import JudgementStore
from ldm.app.models import Models, find_models
from ldm.app.pictures import Pictures
from ldm.app.results import results
from ldm.app.sampling import Settings, picture_metadata, restore, sample
from ldm.app.workspace import Workspace
from ldm.commands import app
from ldm.config import UserError
from ldm.images import read_metadata, save_png
from ldm.pipeline import Pipeline

PROMPT = "a red circle above a blue square"
PLAIN = Image.new("RGB", (4, 4))


@pytest.fixture(scope="module")
def shapes() -> Models:
    return offered("shapes")


def settings(**changes) -> Settings:
    return Settings(**{"model": "tiny", "prompt": PROMPT, "steps": 6, "count": 2, "seed": 5} | changes)


def offered(*names: str) -> Models:
    return Models({name: name for name in names})


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.int16)


def finish(generator: Generator) -> Any:
    """The generator's result."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def test_steps_are_shown_and_the_pictures_are_the_pipelines_own(pipe, monkeypatch):
    monkeypatch.setattr(sampling, "INTERVAL", 0.001)
    kept = []
    shown = list(sample(pipe, settings(), kept))
    assert [step.step for step in kept] == list(range(6)) and shown and all(step in kept for step in shown)
    images, notes = finish(sample(pipe, settings()))
    expected = pipe([PROMPT] * 2, steps=6, guidance=3.0, seed=5)
    assert notes == [] and all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(images, expected, strict=True))
    stopped: list = []
    closed = sample(pipe, settings(steps=150), stopped)
    next(closed)
    closed.close()
    assert len(finish(sample(pipe, settings(steps=2)))[0]) == 2 and len(stopped) < 150


def test_a_model_is_compiled_once_while_the_status_says_so(pipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sampling, "INTERVAL", 0.001)
    pipe.save_pretrained(tmp_path / "tiny")
    expected = pixels(finish(sample(pipe, settings()))[0][1])
    for seconds, count in ((0, 1), (1e9, 0)):  # of compiling; the second one is kept on disk
        monkeypatch.setattr(compilation, "COMPILING", seconds)
        compiled = Models({"tiny": str(tmp_path / "tiny")})["tiny"]
        if count:  # stopped while it compiles
            stopped = sample(compiled, settings(steps=150))
            next(shown for shown in stopped if isinstance(shown, str))
            stopped.close()
        images, _ = finish(sample(compiled, settings()))
        assert abs(pixels(images[1]) - expected).max() <= 1
        assert picture_metadata(compiled, settings())[0]["compiled"] == "float32"
        assert capsys.readouterr().err.count("compiling the") == count
        with attention_maps(compiled) as maps:
            finish(sample(compiled, settings(count=1)))
            assert maps and "compiled" not in picture_metadata(compiled, settings())[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 17}, "multiples of"),
        ({"width": 128, "height": 128}, "2 of that size are too many"),
        ({"prompt": " \0 "}, "the prompt is empty"),
        ({"prompt": "x" * 1001}, "^prompt has 1,001 characters; at most 1,000"),
        ({"negative_prompt": "x" * 10**6}, "negative_prompt has 1,000,000 characters"),
        ({"steps": 10**9}, "steps is 1000000000; it must be from 1 to 150"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": None}, "seed is None"),
        ({"sampler": "../etc"}, "sampler .* unknown|unknown sampler"),
    ],
)
def test_settings_that_cannot_be_sampled_are_refused_by_name(pipe, changes, words):
    with pytest.raises(UserError, match=words) as error:
        finish(sample(pipe, settings(**changes)))
    assert len(str(error.value)) < 200


def test_cut_prompts_and_lack_of_memory_are_reported(pipe, monkeypatch):
    _, (note,) = finish(sample(pipe, settings(prompt=PROMPT * 9)))
    assert "ignored: " in note
    assert settings(prompt="a\0b\n\tc \ud800").prompt == "a b c ?"
    monkeypatch.setattr(pipe.unet, "forward", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(UserError, match="out of memory with 2 of 16x16 px at once; make fewer .*batch size 1"):
        finish(sample(pipe, settings()))


def test_models_are_found_named_and_kept_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/one", "runs/two/diffusion"):
        Path(run).mkdir(parents=True)
        Path(run, "model_index.json").touch()
    shipped = ("emoji", "emoji-turbo", "shapes", "shapes-turbo")
    assert find_models() == {name: name for name in (*shipped, "runs/one", "runs/two/diffusion")}
    given = ["emoji", "/home/me/sd", "/home/you/sd", "runs/one", "../sd"]
    assert find_models(given) == dict(zip(["emoji", "sd", "/home/you/sd", "runs/one", "../sd"], given, strict=True))
    opened = []
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda name, *_: opened.append(name) or Mock())
    models = offered("a", "b", "c")
    for name in "abacab":
        models[name]
    assert opened == ["a", "b", "c", "b"]
    for name in ("../../etc", "emoji", ""):
        with pytest.raises(UserError, match="unknown model .* known: a, b, c$"):
            models[name]


def test_a_png_contains_all_that_making_it_again_takes(pipe, tmp_path):
    sizes = {"width": 16, "height": 16}
    first = settings(negative_prompt="blau <b>", guidance=2.5, guidance_rescale=0.3, sampler="euler", **sizes)
    (_, image), _ = finish(sample(pipe, first))
    save_png(image, tmp_path / "a.png", picture_metadata(pipe, first)[1])
    again, notes = restore(tmp_path / "a.png", offered("tiny"))
    assert notes == [] and again.seed == 6
    (same, *_), _ = finish(sample(pipe, again))
    assert abs(pixels(same) - pixels(image)).max() <= 1
    elsewhere, notes = restore(tmp_path / "a.png", offered("other"))
    assert elsewhere.model == "other" and "not offered" in notes[0]


def test_adapters_are_offered_by_name_merged_recorded_and_restored(pipe, tmp_path):
    files = {name: f"{tmp_path}/{name}.safetensors" for name in ("style", "wide")}
    factors = {"A": torch.ones(2, 16, 3, 3), "B": torch.ones(4, 2, 1, 1)}
    tensors = {f"unet.conv_out.lora_{x}.weight": factor for x, factor in factors.items()}
    save_file(tensors, files["style"])
    save_file(tensors | {"unet.no.lora_A.weight": torch.ones(2)}, files["wide"])
    pipe.save_pretrained(tmp_path / "tiny")
    models = Models({"tiny": str(tmp_path / "tiny")}, adapters=[*files.values()])
    with gr.Blocks():
        ui = Workspace(models, Pictures(tmp_path / "pictures"))
    values = {control: control.value for control in ui.controls.values()} | {ui.history: []}

    def picture(**changes) -> Image.Image:
        given = {"prompt": PROMPT, "steps": 3, "seed": 5, "count": 1} | changes
        values.update({ui.controls[name]: value for name, value in given.items()})
        finish(ui.sample(values, ui.settings(values)))
        return Image.open(values[ui.history][0])

    plain, adapted = picture(), picture(adapters=["style"], adapter_weight=0.5)
    expected = Pipeline.from_pretrained(tmp_path / "tiny").load_lora(files["style"], 0.5)
    (expected,) = expected(PROMPT, steps=3, seed=5, guidance=3.0)
    assert np.array_equal(pixels(adapted), pixels(expected)) and abs(pixels(plain) - pixels(adapted)).max() > 4
    assert adapted.text["lora"] == "style:0.5" and "lora" not in plain.text
    assert models.merged("tiny", ["style"], 0.5) is models.merged("tiny", ["style"], 0.5) is not models["tiny"]
    again, notes = restore(adapted.filename, models)
    assert notes == [] and (again.adapters, again.adapter_weight) == (("style",), 0.5)
    again, (note,) = restore(adapted.filename, Models(models.folders))
    assert again.adapters == () and "'style:0.5' are not offered" in note
    save_png(PLAIN, tmp_path / "script.png", {"prompt": "a", "seed": "1", "model": "tiny", "lora": files["style"]})
    assert restore(tmp_path / "script.png", models)[0].adapters == ("style",)
    for name, words in (("wide", "not fit this model: 1 of its 2 names"), (files["style"], "unknown adapter")):
        with pytest.raises(UserError, match=words) as error:
            picture(adapters=[name])
        assert "\n" not in str(error.value)


def test_pngs_without_settings_or_with_bad_ones_are_refused(tmp_path):
    PLAIN.save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("plain.png", "text.png", "missing.png"):
        with pytest.raises(UserError, match="PNG|image"):
            restore(tmp_path / name, offered("tiny"))
    bad = {"steps": ("many", "many"), "seed": ("1e999", "1e999"), "guidance": ("99", "guidance is 99")}
    for key, (value, words) in (bad | {"prompt": ("x" * 5000, "prompt has 5,000")}).items():
        save_png(PLAIN, tmp_path / "bad.png", {"prompt": "a", "seed": "1", "model": "tiny", key: value})
        with pytest.raises(UserError, match=words):
            restore(tmp_path / "bad.png", offered("tiny"))


def test_browsers_reach_only_finished_pictures_by_their_names(tmp_path):
    pictures = Pictures(tmp_path / "pictures")
    prompts = {"A red circle, 2!": "a-red-circle-2-7-", "../../etc": "etc-7-", "🟥": "7-", "x" * 999: "x" * 40}
    files = pictures.save([PLAIN] * 4, [{"prompt": prompt, "seed": "7"} for prompt in prompts])
    for file, start in zip(files, prompts.values(), strict=True):
        assert Path(file).name.startswith(start) and pictures.find(file) == file
    (tmp_path / "secret.png").touch()
    for path in ("/etc/passwd", str(tmp_path / "secret.png"), "../secret.png", ".", "..", None):
        with pytest.raises(UserError, match="mark a finished picture"):
            pictures.find(path)
    assert pictures.existing(["../secret.png", "/other/" + Path(files[0]).name]) == [files[0]]


def test_comparisons_are_read_from_a_list():
    variants = tabs.variants(settings(), "guidance", "1, 2.5,, 2.5")
    assert {label: s.guidance for label, s in variants.items()} == {"guidance 1": 1.0, "guidance 2.5": 2.5}
    for name, text, words in (("guidance", "", "0 values"), ("seed", "1,2,3,4,5,6,7,8,9", "9"), ("steps", "x", "x")):
        with pytest.raises(UserError, match=words):
            tabs.variants(settings(), name, text)


def test_a_drawing_becomes_a_picture_and_a_mask(tmp_path):
    background = Image.new("RGBA", (300, 200), (0, 0, 255, 255))
    # half of the square, part of a latent
    boxes = {(50, 0, 150, 200): (0, 0, 16, 8), (150, 100, 160, 110): (8, 8, 12, 12)}
    for brushed, (top, left, bottom, right) in boxes.items():
        layer, expected = Image.new("RGBA", (300, 200)), np.zeros((16, 16), bool)
        layer.paste((255, 0, 0, 255), brushed)
        expected[top:bottom, left:right] = True
        image, mask = tabs.read_drawing({"background": background, "layers": [layer]}, 16, 4)
        assert image.getpixel((3, 3)) == (0, 0, 255) and np.array_equal(np.asarray(mask) > 0, expected)
    canvas = Image.new("RGBA", (512, 512))
    canvas.paste(background, (106, 156))
    assert tabs.read_drawing({"background": canvas}, 16, 4) == (image, None)
    for nothing in (None, {}, {"background": None}, {"background": Image.new("RGBA", (9, 9))}):
        with pytest.raises(UserError, match="no picture to edit"):
            tabs.read_drawing(nothing, 16, 4)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    picture.save(tmp_path / "it.png")
    opened = tabs.open_picture(str(tmp_path / "it.png"))
    assert opened.size == (512, 512) and tabs.read_drawing({"background": opened}, 32, 4)[0] == picture


def test_attention_maps_are_distributions_over_tokens(pipe):
    with attention_maps(pipe) as maps:
        pipe(PROMPT, steps=2, guidance=3.0)
    stacked = torch.stack(maps)
    assert stacked.shape[1:] == (12, 8, 8) and len(maps) % 2 == 0
    torch.testing.assert_close(stacked.sum(1), torch.ones_like(stacked[:, 0]))
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())
    positions = token_positions(pipe.tokenizer, "a red   circlecircle")
    ids = pipe.tokenizer.encode("a red circlecircle")
    assert [word for word, _ in positions] == ["a", "red", "circlecircle"]
    assert sum((tokens for _, tokens in positions), []) == list(range(1, len(ids) - 1))
    assert len(token_positions(pipe.tokenizer, "red " * 40)) < 12  # as many as the context holds


def test_a_word_looks_where_its_object_is(shapes):
    """On the shipped model, the map of a noun is brighter on its object than on the other one."""
    with attention_maps(shapes["shapes"]) as maps:
        (image,), _ = finish(sample(shapes["shapes"], settings(model="shapes", steps=12, seed=0, count=1)))
    red, blue = pixels(image)[..., 0] > 180, pixels(image)[..., 2] > 180
    overlays = word_overlays(maps, shapes["shapes"].tokenizer, PROMPT, image)
    gain = {word: pixels(overlay).sum(2) / (pixels(image).sum(2) + 1) for overlay, word in overlays}
    assert [word for _, word in overlays] == PROMPT.split() and red.sum() > 20 and blue.sum() > 20
    assert gain["circle"][red].mean() > gain["circle"][blue].mean() + 0.2
    assert gain["square"][blue].mean() > gain["square"][red].mean() + 0.2


@pytest.fixture(scope="module")
def samples(shapes, tmp_path_factory) -> tuple[list, Path]:
    folder, dataset = tmp_path_factory.mktemp("app"), picture_sets.held_out(shapes, "shapes")
    finish(picture_sets.prepare(shapes["shapes"], "shapes", dataset, 10, 0, folder))
    with pytest.raises(StopIteration) as end:  # all pictures are there
        next(picture_sets.prepare(shapes["shapes"], "shapes", dataset, 10, 0, folder))
    return end.value.value, folder


def test_judged_pictures_are_of_the_same_captions(samples, shapes):
    chosen, folder = samples
    assert [s.seed for s in chosen] == list(range(10)) and all((folder / s.real).is_file() for s in chosen)
    metadata = read_metadata(folder / chosen[9].made)
    assert (metadata["prompt"], metadata["seed"]) == (chosen[9].caption, "9")
    (expected,) = shapes["shapes"](chosen[9].caption, seed=9, guidance=3.0)
    assert abs(pixels(expected) - pixels(Image.open(folder / chosen[9].made))).max() <= 1


@pytest.mark.parametrize(("kind", "flash"), [("single", True), ("single", False), ("pair", False)])
def test_a_study_leads_from_its_questions_to_the_results(samples, tmp_path, kind, flash):
    """A judge who is always right is never fooled; one who is always wrong, always."""
    chosen, folder = samples
    store = JudgementStore(tmp_path / "judgements.sqlite")
    for wrong in (False, True):
        asked = study.questions(kind, 20, {"shapes": chosen}, seed=3, session="me")
        person = study.Study(kind=kind, flash=flash, questions=asked)
        while (question := person.question) is not None:
            person.shown_at = time.monotonic()
            html = tab_judge.question_html(person, folder)
            assert html.count("<img") == len(question.extra["pictures"]) and ".png" not in html
            assert f"({len(person.rights) + 1} of 20)" in html and ("shown for" in html) == flash
            right, other = sorted(study.ANSWERS[kind], key=question.extra["truth"].__ne__)
            if flash:
                assert not person.answer(right, store)  # before the flash has been seen
                person.shown_at -= 2
            assert not person.answer(None, store)  # as another program may send
            assert person.answer(other if wrong else right, store)
        assert "last one" in tab_judge.question_html(person, folder)
        assert (person.exposure or 500) < 500 if flash and not wrong else True
    assert len(store.judgements()) == 40 and {j.right for j in store.judgements()} == {0, 1}
    rows = results(store.judgements())["shapes"]
    assert rows["judgements"] == f"40 {'flash' if flash else kind}"
    name = "wrong, single" if kind == "single" else "generated chosen as real, pairs"
    assert rows[name] == ("no answers yet" if flash else "50% [35%, 65%]")


def test_the_server_gives_out_its_own_pictures_alone_and_one_call_is_open_to_programs(tmp_path, monkeypatch, shapes):
    """Behind a proxy, which would answer for the page when gradio asks it whether it runs."""
    save_png(PLAIN, tmp_path / "secret.png", {"prompt": "a secret", "seed": "1"})
    (mine,) = Pictures(tmp_path / "app" / "pictures").save([PLAIN], [{"prompt": "a", "seed": "1"}])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = f"http://127.0.0.1:{port}"

    def check() -> None:
        assert httpx.get(f"{page}/gradio_api/file={mine}").content == Path(mine).read_bytes()
        for path in ("/etc/passwd", str(tmp_path / "secret.png"), f"{tmp_path}/app/judgements.sqlite"):
            assert httpx.get(f"{page}/gradio_api/file={path}").status_code in (403, 404)
            data = {"path": path, "meta": {"_type": "gradio.FileData"}}  # as if it had been uploaded
            answer = httpx.post(f"{page}/gradio_api/run/show", json={"data": [data]})
            assert answer.status_code >= 400 and "a secret" not in answer.text
        assert str(tmp_path.parent) not in httpx.get(f"{page}/config").text
        for name, status in (("localhost", 200), ("rebound.example", 400)):
            assert httpx.get(f"{page}/config", headers={"Host": f"{name}:{port}"}).status_code == status
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port} .*use another --port"):
            app.check(app.AppOptions(port=port, out=tmp_path / "app"))
        with pytest.raises(UserError, match="--lora no.safetensors: .* exist"):
            app.check(app.AppOptions(lora=("no.safetensors",), out=tmp_path / "app"))
        client = Client(page, download_files=tmp_path / "client", verbose=False)
        described = client.view_api(return_format="dict")
        assert [*described["named_endpoints"]] == ["/generate"] and not described["unnamed_endpoints"]
        parameters = described["named_endpoints"]["/generate"]["parameters"]
        assert [p["parameter_name"] for p in parameters] == ["prompt", "model", "seed", "steps", "guidance"]
        files = client.predict(PROMPT, "shapes", 7, 2, 2.5, api_name="/generate")
        assert all(Path(file).is_relative_to(tmp_path / "client") for file in files)
        images = [Image.open(file) for file in files]
        expected = shapes["shapes"]([PROMPT] * 4, seed=7, steps=2, guidance=2.5)
        assert [image.text["seed"] for image in images] == ["7", "8", "9", "10"]
        assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(images, expected, strict=True))
        settings = Image.open(client.predict(PROMPT, "shapes-turbo", 7, api_name="/generate")[0]).text
        assert (settings["steps"], settings["guidance"]) == ("4", "1.0")  # as it was distilled
        refused = {"unknown model": {"model": "../x"}, "steps is": {"steps": 10**9}, "seed is": {"seed": "x"}}
        for words, wrong in (refused | {"unknown model .*1": {"model": [1]}}).items():
            with pytest.raises(AppError, match=words):
                client.predict(**{"prompt": PROMPT} | wrong, api_name="/generate")

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    for name in ("http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(sampling.EXIT, "wait", check)
    line = [
        "app.py",
        "--model",
        "shapes",
        "--model",
        "shapes-turbo",
        "--port",
        str(port),
        "--out",
        str(tmp_path / "app"),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", line)
    app.main()
    assert sampling.EXIT.is_set() and (tmp_path / "app" / "judgements.sqlite").is_file()
    sampling.EXIT.clear()
