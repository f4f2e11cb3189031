"""The real page in a headless browser, as people use it: `make test-page`. The model is the shipped one of shapes."""

import io
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from ldm.model_io import ASSETS

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle above a blue square"
SEED = "Seed (-1: random)"
TABS = ("Generate", "Edit", "Compare", "Look inside", "Judge")


@contextmanager
def running(out: Path, *options: str) -> Iterator[int]:
    """The page, served by its script, which must end at ctrl-C without a traceback; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts/app.py"), *options, "--port", str(port), "--out", str(out)]
    log = out.with_suffix(".log")
    # a shell that starts tests in the background makes them ignore ctrl-C
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, preexec_fn=restore)
        try:
            wait(lambda: reachable(port) or process.poll() is not None, 300)
            assert process.poll() is None, log.read_text()
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
    assert not re.search("Traceback|terminate called", log.read_text()), log.read_text()


@pytest.fixture(scope="session")
def address(tmp_path_factory) -> Iterator[str]:
    with running(
        tmp_path_factory.mktemp("app") / "out", "--model", "shapes", "--model", "shapes-turbo", "--model", "emoji"
    ) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    yield from opened(browser, address)


@pytest.fixture
def another(browser, address) -> Iterator[Page]:
    yield from opened(browser, address)


def opened(browser: Browser, address: str, width: int = 1440, **options) -> Iterator[Page]:
    """A page that asks for nothing from outside, reports no error and opens no dialog."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    page.set_default_timeout(120_000)
    outside, wrong = [], []
    expected = (
        "AbortError",
        "Connection errored out",
        "could not be decoded",
        "INTERNET_DISCONNECTED",
    )  # by a reload, and by a broken picture
    complain = lambda text: None if any(words in text for words in expected) else wrong.append(text)  # noqa: E731
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else outside.append(r.url))
    page.on("console", lambda m: complain(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complain(str(e)))
    page.on("dialog", lambda d: (wrong.append("dialog"), d.dismiss()))
    page.goto(address)
    page.wait_for_selector("#generate-start")
    yield page
    context.close()
    assert outside == [] and wrong == []


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def until(page: Page, where: str, words: str, seconds: float = 180) -> str:
    """Waits until an element contains words; returns its text."""
    wait(lambda: re.search(words, " ".join(page.locator(where).all_inner_texts())) is not None, seconds)
    return " ".join(page.locator(where).all_inner_texts())


def turn_to(page: Page, tab: str) -> None:
    """Opens a tab, which a narrow page has in a menu."""
    button = page.get_by_role("tab", name=tab, exact=True).first
    if not button.is_visible():
        page.locator(".overflow-menu > button").first.click()
        button = page.locator(".overflow-dropdown button", has_text=tab).first
    button.click()
    page.locator(f"#{tab.split()[-1].lower()}-start").wait_for()


def field(page: Page, label: str):
    return page.get_by_label(label, exact=True).locator("visible=true").first


def number(page: Page, label: str, value: float) -> None:
    """Types a value into a slider's number field."""
    box = page.locator(f'input[type=number][aria-label*="{label}"]').locator("visible=true").first
    box.fill(str(value))
    box.blur()


def served(page: Page, where: str = "#pictures", index: int = 0) -> Image.Image:
    """A picture of a gallery, as its file is served."""
    source = page.locator(f"{where} img").nth(index).get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body()))


def saved(page: Page, button: str, path: Path) -> Path:
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(path)
    return path


def start(page: Page, prompt: str = PROMPT, steps: int = 150, pictures: int = 16, tab: str = "generate") -> None:
    field(page, "Prompt").fill(prompt)
    number(page, "Steps", steps)
    if tab in ("generate", "edit"):
        number(page, "Pictures", pictures)
    if tab == "generate":
        field(page, "Prompt").press("Enter")
    else:
        page.click(f"#{tab}-start")


def generate(page: Page, steps: int = 4, pictures: int = 1) -> str:
    before = page.locator("#pictures img").count()
    start(page, PROMPT, steps, pictures)
    wait(lambda: page.locator("#pictures img").count() == before + pictures)
    return until(page, "#status", "pictures?, seed")


def upload(page: Page, where: str, path: Path) -> None:
    page.locator(f"{where} input[type=file]").first.set_input_files(path)


def drawable(page: Page) -> None:
    """Waits until the picture in Edit can be brushed over and no longer moves: twice the same, and not of one color."""
    page.locator('#edit-editor button[aria-label="Brush"]').wait_for()
    canvas, shots = page.locator("#edit-editor canvas").first, [b""]

    def still() -> bool:
        shots.append(canvas.screenshot())
        return shots[-1] == shots[-2] and len(Image.open(io.BytesIO(shots[-1])).convert("RGB").getcolors(2**20)) > 1

    wait(still)


def test_pictures_appear_while_they_denoise_and_are_the_scripts_own(page, tmp_path):
    page.evaluate("""() => { window.seen = new Set(); new MutationObserver(() => {
        const source = document.querySelector('#pictures img')?.src;
        if (source) seen.add(source);
      }).observe(document.body, {subtree: true, childList: true, attributes: true}); }""")
    field(page, SEED).fill("11")
    assert "3 pictures, seed 11" in generate(page, steps=100, pictures=3)
    wait(lambda: "a-red-circle" in page.locator("#pictures img").first.get_attribute("src"))
    assert page.evaluate("seen.size") >= 3  # previews, and the picture
    command = [sys.executable, "scripts/sample.py", "--model", "shapes", *["--prompt", PROMPT] * 3, "--seed", "11"]
    command += ["--guidance", "3", "--steps", "100", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    for i in range(3):
        mine, expected = served(page, index=i), Image.open(tmp_path / f"{i:04d}-{PROMPT.replace(' ', '-')}.png")
        assert np.array_equal(np.asarray(mine), np.asarray(expected)) and mine.text == expected.text


def test_stop_works_while_it_runs_and_in_the_queue(page, another):
    start(page)
    page.locator("#pictures .thumbnail-item").first.wait_for()
    start(another, pictures=1)
    until(another, "#status", "Number 2 in line")
    another.click("#stop")
    until(another, "#status", "Stopped")
    page.locator("#pictures .thumbnail-item").first.click()  # a preview
    assert not page.locator("#download").is_visible() and page.evaluate("marked()") == ""
    field(page, SEED).fill("12")  # what is typed in mid-run stays
    page.keyboard.press("Escape")
    until(page, "#status", "Stopped")
    page.wait_for_timeout(1000)
    for stopped in (page, another):  # nothing late comes over it
        assert stopped.locator("#status").inner_text() == "Stopped." and stopped.locator("#pictures img").count() == 0
        assert not stopped.locator("#stop").is_visible()
    assert field(page, SEED).input_value() == "12" and "1 picture, seed 12" in generate(page)
    start(page, " ", steps=1, pictures=1)
    until(page, "#status", "^The prompt is empty; describe the picture$")


def test_a_closed_page_leaves_the_line(page, browser, address):
    for closed in opened(browser, address):
        start(closed)
        until(closed, "#status", "Step")
    assert "1 picture," in generate(page)


def test_examples_are_those_of_the_model_and_are_drawn_at_a_click(page):
    shown = page.locator("#examples button")
    assert shown.all_inner_texts() == (ASSETS / "shapes/examples.txt").read_text().splitlines()
    page.locator("#setting-model input").click()
    page.get_by_role("option", name="emoji", exact=True).click()
    wait(lambda: shown.all_inner_texts() == (ASSETS / "emoji/examples.txt").read_text().splitlines())
    shown.nth(4).click()
    wait(lambda: field(page, "Prompt").input_value() == "red heart, 3D")
    page.click("#generate-start")
    until(page, "#status", "4 pictures, seed")
    red, green, blue = np.asarray(served(page).resize((3, 3)), int)[1, 1]
    assert red > 180 and max(green, blue) < 130


def test_the_marked_picture_is_taken_and_settings_come_back(page, tmp_path):
    field(page, "Negative prompt (what to avoid)").fill("green")
    field(page, SEED).fill("77")
    generate(page, steps=7, pictures=3)
    thumbnails, marked = page.locator("#pictures .thumbnail-item"), lambda: page.evaluate("marked()")
    expect(thumbnails.first).to_have_attribute("aria-label", PROMPT)  # once its picture is there
    page.evaluate("""() => { const own = window.fetch; window.fetch = async (...request) => {
        await new Promise(done => setTimeout(done, 1000)); return own(...request); }; }""")  # a slow server
    thumbnails.nth(2).click()
    assert "square-79-" in marked()
    assert Image.open(saved(page, "#download", tmp_path / "mine.png")).text["seed"] == "79"
    page.click("#same")
    wait(lambda: field(page, SEED).input_value() == "79")
    field(page, SEED).fill("-1")
    seeds = {re.search("seed (.*)[.]", generate(page, steps=3 + i))[1] for i in range(2)}  # others each time
    last = Image.open(saved(page, "#download", tmp_path / "last.png"))
    assert len(seeds) == 2 and last.text["seed"] in seeds and last.text["steps"] == "4"
    page.reload()
    wait(lambda: thumbnails.count() == 5 and field(page, "Prompt").input_value() == PROMPT)
    assert field(page, SEED).input_value() == "-1" and marked() == "" and not page.locator("#download").is_visible()
    thumbnails.nth(4).click()
    page.click("#enlarge")
    assert page.locator("dialog img").get_attribute("alt") == PROMPT
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    page.click("#use")
    wait(lambda: field(page, SEED).input_value() == "79")
    field(page, SEED).fill("0")
    field(page, "Prompt").fill("")
    with page.expect_file_chooser() as chooser:
        page.click("#generate-file")
    chooser.value.set_files(tmp_path / "mine.png")
    wait(lambda: field(page, SEED).input_value() == "79")
    assert field(page, "Prompt").input_value() == PROMPT
    assert field(page, "Negative prompt (what to avoid)").input_value() == "green"


def test_a_server_that_went_away_is_told_and_the_page_goes_on(page):
    field(page, "Prompt").fill("two blue squares")
    page.wait_for_timeout(1000)
    page.context.set_offline(True)
    until(page, "#status", "The server went away. Start it again")
    page.context.set_offline(False)
    wait(lambda: page.locator("#status").inner_text() == "" and page.locator("#generate-start").is_visible())
    wait(lambda: field(page, "Prompt").input_value() == "two blue squares")


def test_hostile_prompts_are_only_text(page):
    hostile = "<img src=x onerror=alert(1)> \u202eدائرة\u202c a\0b\x07 '; DROP TABLE judgements; -- 🟥"
    start(page, hostile, steps=2, pictures=1)
    until(page, "#status", "1 picture")
    assert page.locator("#status img").count() == 0


def test_only_the_part_under_the_brush_is_redrawn(page, tmp_path):
    turn_to(page, "Edit")
    (tmp_path / "no.png").write_bytes(b"no picture" * 99)
    upload(page, "#edit-editor", tmp_path / "no.png")
    until(page, "#status", "cannot be read as a picture")
    photograph = Image.new("RGB", (3000, 3000), (128, 128, 128))  # a large one
    photograph.paste((255, 0, 0), (375, 375, 1220, 1220))
    photograph.save(tmp_path / "start.jpg")
    upload(page, "#edit-editor", tmp_path / "start.jpg")
    drawable(page)
    page.locator('#edit-editor button[aria-label="Brush"]').click()
    box = page.locator("#edit-editor canvas").first.bounding_box()
    for y in (0.6, 0.68, 0.76):  # in the lower right quarter
        page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + box["height"] * y)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.72, box["y"] + box["height"] * y, steps=8)
        page.mouse.up()
    number(page, "Strength", 1.0)
    start(page, "a red square and a blue circle", steps=30, pictures=1, tab="edit")
    until(page, "#status", "1 picture,")
    assert served(page).text["mask"] == "drawn"
    before = np.asarray(photograph.resize((32, 32), Image.Resampling.BOX), np.float64)
    change = abs(np.asarray(served(page), np.float64) - before).mean(2)
    assert change[:14, :14].mean() < 25 and change[16:, 16:].max() > 60


def test_a_picture_goes_from_generate_to_edit_and_its_edits_join_it(page):
    generate(page, steps=20)
    page.click("#edit")
    drawable(page)
    assert field(page, "Prompt").input_value() == PROMPT
    number(page, "Strength", 0.3)
    start(page, "a green square", steps=20, pictures=1, tab="edit")
    wait(lambda: page.locator("#pictures img").count() == 2)
    edited, first = (np.asarray(served(page, index=i), np.float64) for i in range(2))
    assert 0.1 < abs(edited - first).mean() < 40
    before, after = (np.asarray(served(page, "#edit-change", i), np.float64) for i in range(2))
    assert abs(before - first).mean() < 1 and np.array_equal(after, edited)  # before went through the editor's canvas


def test_a_comparison_is_labelled_and_also_one_picture(page, tmp_path):
    turn_to(page, "Compare")
    field(page, "Values, up to 8, separated by commas").fill("1, 3")
    assert not page.locator("#setting-guidance").is_visible() and page.locator("#setting-steps").is_visible()
    start(page, steps=8, tab="compare")
    labels = page.locator("#pictures .caption-label")
    wait(lambda: labels.all_inner_texts() == ["all", "guidance 1", "guidance 3"] and labels.last.is_visible())
    grid = Image.open(saved(page, "#download", tmp_path / "grid.png"))
    assert grid.width > 400 and grid.text["values"] == "1, 3" and served(page, index=2).text["guidance"] == "3.0"
    field(page, "Second setting, down the rows").click()
    page.get_by_role("option", name="seed", exact=True).click()
    page.locator("#setting-seed").wait_for(state="hidden")
    field(page, "Its values").fill("4, 5")
    page.click("#compare-start")
    pairs = [f"guidance {guidance}, seed {seed}" for seed in (4, 5) for guidance in (1, 3)]
    wait(lambda: labels.all_inner_texts() == ["all", *pairs])
    last = served(page, index=4).text
    assert (last["guidance"], last["seed"]) == ("3.0", "5")
    assert abs(np.subtract(*Image.open(saved(page, "#download", tmp_path / "table.png")).size)) < 100  # two by two


def test_a_distilled_model_is_compared_in_its_own_steps(page):
    turn_to(page, "Compare")
    field(page, "Setting to compare").click()
    page.get_by_role("option", name="model", exact=True).click()
    values = field(page, "Values, up to 8, separated by commas")
    expect(values).to_have_value("shapes, shapes-turbo, emoji")
    values.fill("shapes, shapes-turbo")
    start(page, steps=8, tab="compare")
    wait(
        lambda: page.locator("#pictures .caption-label").all_inner_texts()[1:] == ["model shapes", "model shapes-turbo"]
    )
    made = [served(page, index=i).text for i in (1, 2)]
    assert [(text["steps"], text["guidance"]) for text in made] == [("8", "3.0"), ("4", "1.0")]


def test_look_inside_shows_the_way_and_the_words(page):
    turn_to(page, "Look inside")
    start(page, steps=30, tab="inside")
    words = page.locator("#inside-words .caption-label")
    wait(lambda: page.locator("#pictures img").count() == 9 and words.all_inner_texts() == PROMPT.split())


def judge(page: Page, question: str, answers: list[str]) -> None:
    """Answers a round of questions."""
    turn_to(page, "Judge")
    number(page, "Questions", len(answers) or 6)
    field(page, "Question").click()
    page.get_by_role("option", name=question, exact=True).click()
    page.click("#judge-start")
    until(page, "#judge-view", r"\(1 of 6\)")
    for i, answer in enumerate(answers):
        until(page, "#judge-view", rf"\({i + 1} of 6\)")
        choices = page.locator("#judge-answer label")
        wait(lambda choices=choices, answer=answer: answer in choices.all_inner_texts())
        page.keyboard.press(str(choices.all_inner_texts().index(answer) + 1))
    if answers:
        until(page, "#judge-view", "last one")


def test_judgements_lead_to_a_result(page):
    judge(page, "Real or generated?", ["Generated"] * 6)
    results = until(page, "#judge-results", "6 single")
    assert "0% [0%, 56%]" in results  # who calls all of them generated is never fooled


def test_a_preference_between_two_models_is_exported(page, tmp_path):
    judge(page, "Which fits the caption better?", [*["Left"] * 5, "Tie"])
    lines = saved(page, "#judge-export", tmp_path / "preferences.jsonl").read_text().splitlines()
    assert len(lines) == 5  # without the tie


def test_a_flash_is_seen_for_its_time_and_then_covered(page):
    judge(page, "Which one is real, in flashes?", [])
    # halts the animations, and notes what is visible at moments that do not depend on how busy the browser is
    exposure, visible = page.evaluate("""() => {
      const view = document.querySelector('#judge-view'), cell = view.querySelector('.cell');
      const parts = ['cross', 'shot', 'mask'].map(name => cell.querySelector('.' + name));
      const moving = parts.flatMap(part => part.getAnimations());
      const exposure = Number(/shown for (\\d+) ms/.exec(view.innerText)[1]);
      moving.forEach(animation => animation.pause());
      const visible = [0, 899, 901, 899 + exposure, 902 + exposure, 60000].map(time => {
        moving.forEach(animation => { animation.currentTime = time; });
        return parts.map(part => getComputedStyle(part).visibility === 'visible').join();
      });
      return [exposure, visible]; }""")
    assert exposure == 500
    cross, shot, mask = "true,false,false", "false,true,false", "false,false,true"
    assert visible == [cross, cross, shot, shot, mask, mask]


def test_it_ends_when_told_in_the_middle_of_a_picture(browser, tmp_path):
    with running(tmp_path / "out", "--model", "shapes") as port:
        page = browser.new_context().new_page()
        page.goto(f"http://127.0.0.1:{port}")
        for _ in range(2):  # a reload in mid-run leaves a page that works
            page.reload()
            page.wait_for_selector("#generate-start")
            start(page)
            until(page, "#status", r"Step \d")


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1440, "light"), (1440, "dark")])
def test_every_tab_fits_and_every_control_has_a_name(browser, address, width, scheme):
    for page in opened(browser, address, width, color_scheme=scheme):
        for tab in TABS:
            turn_to(page, tab)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            nameless = page.evaluate("""() => [...document.querySelectorAll('input, textarea, select, button')]
              .filter(e => e.offsetParent && e.type !== 'file' && !(e.ariaLabel || e.title || e.innerText?.trim() ||
                e.labels?.length || e.getAttribute('aria-labelledby'))).map(e => e.outerHTML.slice(0, 200))""")
            assert nameless == [], tab
            broken = Axe().run(page).response["violations"]
            assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in broken] == [], tab
