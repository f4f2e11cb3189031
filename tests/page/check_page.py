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
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle above a blue square"
TABS = ("Make", "Edit", "Compare", "Look inside", "Judge")


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
    with running(tmp_path_factory.mktemp("app") / "out", "--model", "shapes", "--model", "emoji") as port:
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
    expected = ("AbortError", "Connection errored out", "could not be decoded")  # by a reload, and by a broken picture
    complain = lambda text: None if any(words in text for words in expected) else wrong.append(text)  # noqa: E731
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else outside.append(r.url))
    page.on("console", lambda m: complain(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complain(str(e)))
    page.on("dialog", lambda d: (wrong.append("dialog"), d.dismiss()))
    page.goto(address)
    page.wait_for_selector("#make-start")
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
    return page.locator("[role=tabpanel]:visible").get_by_label(label, exact=True).locator("visible=true").first


def number(page: Page, label: str, value: float) -> None:
    """Types a value into a slider's number field."""
    inputs = page.locator(f'[role=tabpanel]:visible input[type=number][aria-label*="{label}"]')
    box = inputs.locator("visible=true").first
    box.fill(str(value))
    box.blur()


def pixels(page: Page, where: str, index: int = 0) -> np.ndarray:
    return np.asarray(served(page, where, index), np.float64)


def served(page: Page, where: str, index: int = 0) -> Image.Image:
    """A picture of a gallery, as its file is served."""
    source = page.locator(f"{where} img").nth(index).get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body()))


def start(page: Page, prompt: str = PROMPT, steps: int = 150, pictures: int = 16) -> None:
    field(page, "Prompt").fill(prompt)
    number(page, "Steps", steps)
    number(page, "Pictures", pictures)
    page.click("#make-start")


def make(page: Page, prompt: str = PROMPT, steps: int = 4, pictures: int = 1) -> str:
    start(page, prompt, steps, pictures)
    return until(page, "#make-status", "pictures? in")


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
        const source = document.querySelector('#make-pictures img')?.src;
        if (source) seen.add(source);
      }).observe(document.body, {subtree: true, childList: true, attributes: true}); }""")
    field(page, "Seed").fill("11")
    start(page, steps=60, pictures=3)
    assert "seed 11" in until(page, "#make-status", "pictures in")
    wait(lambda: "a-red-circle" in page.locator("#make-pictures img").first.get_attribute("src"))
    assert page.evaluate("seen.size") >= 3  # previews, and the picture
    command = [sys.executable, "scripts/sample.py", "--model", "shapes", *["--prompt", PROMPT] * 3, "--seed", "11"]
    command += ["--guidance", "3", "--steps", "60", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    for i in range(3):
        mine = served(page, "#make-pictures", i)
        expected = Image.open(tmp_path / f"{i:04d}-{PROMPT.replace(' ', '-')}.png")
        assert np.array_equal(np.asarray(mine), np.asarray(expected)) and mine.text == expected.text


def test_stop_works_while_it_runs_and_in_the_queue(page, another):
    start(page)
    page.locator("#make-pictures .thumbnail-item").first.wait_for()
    with another.expect_response(re.compile("queue/join")):
        start(another, pictures=1)
    another.click("#make-stop")
    until(another, "#make-status", "Stopped")
    page.click("#make-stop")
    until(page, "#make-status", "Stopped")
    page.locator("#make-pictures .thumbnail-item").first.click()
    until(page, ".toast-body", "preview")
    assert page.locator("#make-download").is_disabled() and "1 picture in" in make(page)
    assert another.locator("#make-pictures img").count() == 0


def test_settings_come_back_from_a_click_from_a_file_and_after_a_reload(page, tmp_path):
    field(page, "Negative prompt (what to avoid)").fill("green")
    field(page, "Seed").fill("77")
    make(page, steps=7, pictures=2)
    wait(lambda: page.locator("#make-history img").count() == 2)
    page.reload()
    wait(lambda: page.locator("#make-history img").count() == 2)
    page.locator("#make-history .thumbnail-item").nth(1).click()
    until(page, "#make-status", "settings of that picture")
    assert field(page, "Seed").input_value() == "78"
    with page.expect_download() as download:
        page.click("#make-download")
    download.value.save_as(tmp_path / "mine.png")
    field(page, "Prompt").fill("")
    field(page, "Seed").fill("0")
    page.locator("#make-file input[type=file]").set_input_files(tmp_path / "mine.png")
    wait(lambda: field(page, "Seed").input_value() == "78")
    assert field(page, "Prompt").input_value() == PROMPT
    assert field(page, "Negative prompt (what to avoid)").input_value() == "green"
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.reload()
    page.wait_for_selector("#make-start")
    page.locator("#make-file input[type=file]").set_input_files(tmp_path / "plain.png")
    until(page, ".toast-body", "PNG")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (" \n\t ", "the prompt is empty"),
        ("x" * 2**20, "1,048,576 characters; at most 1,000"),
        ("<img src=x onerror=alert(1)><script>alert(2)</script>", ""),
        ("\u202eدائرة حمراء\u202c a\0b\x07 '; DROP TABLE judgements; -- 🟥", ""),
    ],
)
def test_hostile_prompts_are_answered_in_the_page(page, prompt, words):
    start(page, prompt, steps=2, pictures=1)
    until(page, ".toast-body" if words else "#make-status", words or "picture in")
    assert page.locator("#make-status img").count() == 0


def test_only_the_part_under_the_brush_is_redrawn(page, tmp_path):
    turn_to(page, "Edit")
    (tmp_path / "no.png").write_bytes(b"no picture" * 99)
    page.locator("#edit-editor input[type=file]").first.set_input_files(tmp_path / "no.png")
    until(page, "#edit-status", "cannot be read as a picture")
    photograph = Image.new("RGB", (3000, 3000), (128, 128, 128))  # a large one
    photograph.paste((255, 0, 0), (375, 375, 1220, 1220))
    photograph.save(tmp_path / "start.jpg")
    page.locator("#edit-editor input[type=file]").first.set_input_files(tmp_path / "start.jpg")
    drawable(page)
    page.locator('#edit-editor button[aria-label="Brush"]').click()
    box = page.locator("#edit-editor canvas").first.bounding_box()
    for y in (0.6, 0.68, 0.76):  # in the lower right quarter
        page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + box["height"] * y)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.72, box["y"] + box["height"] * y, steps=8)
        page.mouse.up()
    field(page, "Prompt").fill("a red square and a blue circle")
    number(page, "Strength", 1.0)
    page.click("#edit-start")
    until(page, "#edit-status", "picture in")
    assert served(page, "#edit-pictures").text["mask"] == "drawn"
    before = np.asarray(photograph.resize((32, 32), Image.Resampling.BOX), np.float64)
    change = abs(pixels(page, "#edit-pictures") - before).mean(2)
    assert change[:14, :14].mean() < 25 and change[16:, 16:].max() > 60


def test_a_picture_goes_from_make_to_edit(page):
    page.click("#make-edit")
    until(page, ".toast-body", "preview")
    make(page, steps=20)
    wait(lambda: page.locator("#make-download").is_enabled())
    page.click("#make-edit")
    drawable(page)
    assert field(page, "Prompt").input_value() == PROMPT
    field(page, "Prompt").fill("a green square")
    number(page, "Strength", 0.3)
    page.click("#edit-start")
    until(page, "#edit-status", "picture in")
    assert 0.1 < abs(pixels(page, "#make-pictures") - pixels(page, "#edit-pictures")).mean() < 40


def test_between_two_prompts(page):
    turn_to(page, "Edit")
    page.get_by_role("tab", name="Between two prompts").click()
    field(page, "From this prompt").fill("a red circle")
    field(page, "To this prompt").fill("a blue square")
    page.click("#between-start")
    until(page, "#between-status", "7 pictures in")
    wait(lambda: page.locator("#between-pictures img").count() == 7)
    first, last = (pixels(page, "#between-pictures", i).mean((0, 1)) for i in (0, 6))
    assert first[0] > first[2] and last[2] > last[0]


def test_a_comparison_is_a_labelled_picture_to_download(page, tmp_path):
    turn_to(page, "Compare")
    field(page, "Prompt").fill(PROMPT)
    values = field(page, "Values, up to 8, separated by commas")
    values.fill("1, 3")
    number(page, "Steps", 8)
    page.click("#compare-start")
    until(page, "#compare-status", "Done, with seed")
    assert page.locator("#compare-pictures .caption-label").all_inner_texts() == ["guidance 1", "guidance 3"]
    with page.expect_download() as download:
        page.click("#compare-download")
    download.value.save_as(tmp_path / "grid.png")
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 400 and grid.text["values"] == "1, 3"
    values.fill("many")
    page.click("#compare-start")
    until(page, ".toast-body", "no value of guidance")


def test_look_inside_shows_the_way_the_words_and_the_schedule(page):
    turn_to(page, "Look inside")
    field(page, "Prompt").fill(PROMPT)
    page.click("#inside-start")
    until(page, "#inside-status", "Seed 0")
    wait(lambda: page.locator("#inside-pictures img").count() == 9 and page.locator("#inside-plot img").count() == 1)
    assert page.locator("#inside-words .caption-label").all_inner_texts() == PROMPT.split()


def judge(page: Page, question: str, flashes: bool = False) -> None:
    turn_to(page, "Judge")
    number(page, "Questions", 6)
    field(page, "Question").click()
    page.get_by_role("option", name=question, exact=True).click()
    if flashes:
        field(page, "In flashes").check()
    page.click("#judge-start")
    until(page, "#judge-view", r"\(1 of 6\)")


def test_judgements_lead_to_a_result_also_over_a_reload(page):
    judge(page, "Real or generated?")
    for i in range(6):
        until(page, "#judge-view", rf"\({i + 1} of 6\)")
        assert page.locator("#judge-view img").count() == 1
        if i == 3:
            page.reload()
            page.wait_for_selector("#make-start")
            turn_to(page, "Judge")
            until(page, "#judge-view", r"\(4 of 6\)")
        page.click("#judge-answer-1")
    until(page, "#judge-view", "last one")
    results = until(page, "#judge-results", "6 single")
    assert "0% [0%, 56%]" in results  # who calls all of them generated is never fooled


def test_a_preference_between_two_models_is_exported(page, tmp_path):
    judge(page, "Which fits the caption better?")
    for i in range(6):
        until(page, "#judge-view", rf"\({i + 1} of 6\)")
        page.click(f"#judge-answer-{2 if i == 5 else 0}")
    until(page, "#judge-view", "last one")
    with page.expect_download() as download:
        page.click("#judge-export")
    download.value.save_as(tmp_path / "preferences.jsonl")
    assert len((tmp_path / "preferences.jsonl").read_text().splitlines()) == 5  # without the tie


def test_a_flash_is_seen_for_its_time_and_then_covered(page):
    judge(page, "Which one is real?", flashes=True)
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
        page.wait_for_selector("#make-start")
        start(page)
        until(page, "#make-status", r"step \d")
        page.reload()  # leaves a page that works
        page.wait_for_selector("#make-start")
        make(page)
        start(page)
        until(page, "#make-status", r"step \d")


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1440, "light")])
def test_every_tab_fits_and_every_control_has_a_name(browser, address, width, scheme):
    for page in opened(browser, address, width, color_scheme=scheme):
        for tab in TABS:
            turn_to(page, tab)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            nameless = page.evaluate("""() => [...document.querySelectorAll('input, textarea, select, button')]
              .filter(e => e.offsetParent && e.type !== 'file' && !(e.ariaLabel || e.title || e.innerText?.trim() ||
                e.labels?.length || e.getAttribute('aria-labelledby'))).map(e => e.outerHTML.slice(0, 200))""")
            assert nameless == [], tab


def test_the_keyboard_is_enough(page):
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "TEXTAREA":
            break
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    until(page, "#make-status", "pictures in")
