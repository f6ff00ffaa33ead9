"""The web page, in a real browser: what people see there is what the Answerer answers."""

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import require_engine
from playwright.sync_api import Browser, Download, Locator, Page, Request, expect, sync_playwright
from test_http import ASK, CLIP, CLIPS, GERMAN, Running, direct, joined, serving, told
from test_http_limits import idle, wait_until

from serve.answer import Answer, Word
from serve.answerer import Answerer
from serve.formats import Format, write
from speechllm.checkpoint import Checkpoint, load_checkpoint
from speechllm.tasks import Segment

PHONE = {"width": 360, "height": 740}
MARKUP = "<img src=x onerror=alert(1)>"
# keeps each text that an answer had, from the first word on
WATCH = """
    window.texts = [];
    new MutationObserver(() => {
      const text = document.querySelector(".busy .text")?.textContent;
      if (text && text !== texts.at(-1)) texts.push(text);
      if (text && window.impatient) document.querySelector(".busy .plain").click();
    }).observe(document, { subtree: true, childList: true });
"""
DROP = """([name, sound]) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([Uint8Array.from(atob(sound), (letter) => letter.charCodeAt(0))], name));
    document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
}"""
SHOW = """async ([answer, name, sound]) => {
    const { Card } = await import("/page/card.js");
    const blob = new Blob([Uint8Array.from(atob(sound), (letter) => letter.charCodeAt(0))]);
    const card = new Card({ name, blob }, [answer.instruction], {});
    document.querySelector("#answers").replaceChildren(card.element);
    card.finish([answer]);
}"""


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return load_checkpoint()


@pytest.fixture(scope="module")
def server(shipped: Checkpoint) -> Iterator[Running]:
    with serving(shipped) as running:
        yield running


@pytest.fixture(scope="module")
def alone(shipped: Checkpoint) -> Answerer:
    """The same model without a server."""
    return Answerer(shipped)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talk") / "my talk.wav"
    path.write_bytes(joined((*CLIPS, *CLIPS)))  # longer than can be heard at once
    return path


@pytest.fixture(scope="module")
def whole(alone: Answerer, talk: Path) -> Answer:
    """What is to be answered about the talk."""
    (answer,) = direct(alone, clip=talk)
    assert len(answer.segments) > 2
    return answer


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Its microphone hears a clip again and again."""
    require_engine("chromium")
    microphone = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--mute-audio", *microphone, f"--use-file-for-fake-audio-capture={CLIP}"],
        )
        yield running
        running.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, server: Running) -> Iterator[Open]:
    """Opens the page and sees to it that nothing goes wrong there, and that it speaks with its server only.

    refused: whether the server is to refuse something, which the browser's console notes by itself.
    """
    contexts = []
    faults: list[str] = []

    def opened(at: Running = server, refused: bool = False, **settings: Any) -> Page:
        context = browser.new_context(**settings)
        contexts.append(context)
        context.add_init_script(WATCH)
        page = context.new_page()
        page.set_default_timeout(10_000)

        def note(kind: str, text: str) -> None:
            if kind in ("error", "warning") and not (refused and text.startswith("Failed to load resource")):
                faults.append(text)

        def check(request: Request) -> None:
            if not request.url.startswith((f"{at.url}/", "blob:")):
                faults.append(request.url)

        page.on("console", lambda message: note(message.type, message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", check)
        page.goto(at.url)
        expect(page).to_have_url(f"{at.url}/page/")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults


def ask(page: Page, clip: Path | None = CLIP) -> Locator:
    """The card that comes of it, once it is answered."""
    if clip:
        page.set_input_files("#file", clip)
    before = page.locator(".card").count()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".card")).to_have_count(before + 1)
    card = page.locator(".card").first
    expect(card).not_to_have_class("card busy")
    return card


def texts(card: Locator) -> list[str]:
    return card.locator(".text").all_inner_texts()


def download(card: Locator, name: str) -> tuple[str, str]:
    """The file's name and what is in it."""
    with card.page.expect_download() as waiting:
        card.get_by_role("link", name=name).click()
    got: Download = waiting.value
    return got.suggested_filename, got.path().read_text(encoding="utf-8")


def wide(page: Page) -> bool:
    """Whether it must be scrolled sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))


def test_a_file_is_answered(open_page: Open, alone: Answerer) -> None:
    (expected,) = direct(alone)
    page = open_page()
    expect(page.locator("#model")).to_have_text("speechllm-tiny")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("Record something, or choose a file.")
    card = ask(page)
    assert texts(card) == [expected.text]
    told_words = card.locator(".word").evaluate_all("words => words.map((word) => [word.textContent, word.title])")
    assert told_words == [[word.text, f"{round(100 * word.confidence)}% sure"] for word in expected.words]
    seconds = f"{expected.seconds_in:.1f}"
    sure = f"{round(100 * expected.confidence)}% sure"
    assert card.locator(".facts").inner_text() == f"{seconds} of {seconds} s heard · complete · {sure}"
    expect(page.get_by_role("alert")).to_have_text("")


def test_several_questions_at_once(open_page: Open, alone: Answerer) -> None:
    page = open_page()
    offered = page.locator("#tasks label")
    assert {ASK, GERMAN, "Who speaks when?"} < {*offered.all_inner_texts()}
    page.get_by_label(GERMAN).check()
    page.get_by_role("button", name="Write a question").click()
    page.get_by_label("Question").fill(f"{MARKUP} Who?")
    posts: list[Request] = []
    page.on("request", lambda request: posts.append(request) if request.method == "POST" else None)
    page.evaluate(DROP, ["dropped.wav", base64.b64encode(CLIP.read_bytes()).decode()])
    card = ask(page, None)
    expected = direct(alone, ASK, GERMAN, f"{MARKUP} Who?")
    assert texts(card) == [answer.text for answer in expected]
    assert len(set(texts(card))) > 1
    assert card.locator("h3").all_inner_texts() == [ASK, GERMAN, f"{MARKUP} Who?"]  # text, not markup
    assert page.locator("img").count() == 0
    assert [post.url.partition("/v1/")[2] for post in posts] == ["audio/transcriptions"]
    name, document = download(card.locator(".answer").nth(1), "SRT")
    assert (name, document) == ("dropped-2.srt", write(expected[1], Format.srt))


def test_words_are_seen_as_they_arrive(open_page: Open, whole: Answer, talk: Path) -> None:
    page = open_page()
    card = ask(page, talk)
    seen = page.evaluate("texts")
    assert len(seen) > 1
    assert all(whole.text.startswith(text) for text in seen)
    assert seen == sorted(set(seen), key=len)
    assert card.locator(".segment span[dir]").all_inner_texts() == [segment.text for segment in whole.segments]
    for format in (Format.srt, Format.vtt, Format.rttm):
        assert download(card, format.upper()) == (f"my talk{format.suffix}", write(whole, format))
    name, document = download(card, "JSON")
    assert (name, told(json.loads(document))) == ("my talk.json", told(whole))


def test_cancel(open_page: Open, server: Running, whole: Answer, talk: Path) -> None:
    page = open_page()
    page.evaluate("window.impatient = true")
    card = ask(page, talk)
    expect(card.get_by_role("status")).to_have_text("Cancelled")
    (text,) = texts(card)
    assert text and whole.text.startswith(text) and text != whole.text
    wait_until(lambda: idle(server))
    card.get_by_role("button", name="Remove").click()
    assert page.locator(".card").count() == 0


def test_errors_are_the_servers(open_page: Open, server: Running, tmp_path: Path) -> None:
    bad = tmp_path / "notes.wav"
    bad.write_text("no audio at all")
    page = open_page(refused=True)
    message = server.post(files={"file": (bad.name, bad.read_bytes())}).json()["error"]["message"]
    assert bad.name in message
    card = ask(page, bad)
    expect(card.get_by_role("alert")).to_have_text(message)
    assert texts(ask(page, CLIP)) != [""]  # all the same
    expect(page.locator(".card")).to_have_count(2)


def made_up(*segments: Segment, text: str = "", label: str | None = None) -> Answer:
    words = tuple(Word(word, 0.3, s.start, s.end) for s in segments for word in s.text.split())
    return Answer(
        "a b.c.wav", "Who?", None, text, segments, words, label, {}, 0.5, 3.2, 3.2, "stop", "none", 1, 1, {}
    )  # fmt: skip


def test_documents_are_those_of_the_command(open_page: Open) -> None:
    answers = [
        made_up(Segment("spk 1", 0.5, 1.25, "a --> b"), Segment("<spk2>", 0.25, 0.25, "x < y & z\n\n more"), text="a"),
        made_up(Segment(None, 3600.5, 36000.0), text="long"),
        made_up(text="angry", label="very angry"),
        made_up(text="no speech"),
        made_up(),
    ]
    written = open_page().evaluate(
        """async (answers) => {
            const { FORMATS } = await import("/page/formats.js");
            return answers.map((answer) => Object.entries(FORMATS).map(([name, write]) => [name, write(answer)]));
        }""",
        [answer.to_dict() for answer in answers],
    )
    for answer, pairs in zip(answers, written, strict=True):
        documents = dict(pairs)
        assert json.loads(documents.pop("json")) == answer.to_dict()
        assert documents == {name: write(answer, Format(name)) for name in ("srt", "vtt", "rttm")}


def test_speakers_in_colours_can_be_played(open_page: Open) -> None:
    segments = Segment("spk1", 0.0, 1.0, "a b"), Segment("spk2", 0.8, 1.6, "c"), Segment("spk1", 2.0, 2.4, "d")
    page = open_page()
    sound = base64.b64encode(CLIP.read_bytes()).decode()
    page.evaluate(SHOW, [made_up(*segments, text="…").to_dict(), CLIP.name, sound])
    rows = page.locator(".segment")
    assert [row.split("\n") for row in rows.all_inner_texts()] == [
        ["0.00–1.00 s", "spk1", "a b"],
        ["0.80–1.60 s", "spk2", "c"],
        ["2.00–2.40 s", "spk1", "d"],
    ]
    one, two, again = rows.evaluate_all("rows => rows.map((row) => getComputedStyle(row).borderLeftColor)")
    assert one == again != two
    slider = page.get_by_role("slider")
    expect(slider).to_have_attribute("aria-valuemax", "3.2")
    colors = """(canvas, times) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return times.map((time) => {
          const found = new Set();
          const left = Math.round((time / 3.23) * canvas.width);
          for (let y = 0; y < canvas.height; y++)
            for (let x = left; x < left + 3; x++) {
              const [red, green, blue, opacity] = data.slice(4 * (y * canvas.width + x));
              if (opacity === 255) found.add(`rgb(${red}, ${green}, ${blue})`);
            }
          return [...found];
        });
    }"""
    before, both, after, nobody = page.locator(".wave canvas").evaluate(colors, [0.4, 0.9, 1.4, 1.8])
    assert (before, sorted(both), after) == ([one], sorted([one, two]), [two])
    assert len(nobody) == 1 and nobody[0] not in (one, two)

    rows.nth(2).click()
    expect(rows.nth(2)).to_have_attribute("data-now", "")
    expect(page.get_by_role("button", name="Play")).to_be_visible()  # it has stopped
    assert 2.4 <= float(slider.get_attribute("aria-valuenow") or 0) < 2.8
    slider.press("Home")
    slider.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "1.0 of 3.2 seconds")
    box = slider.bounding_box()
    assert box
    slider.click(position={"x": box["width"] * 2.3 / 3.2, "y": 10})
    expect(rows.nth(2)).to_have_attribute("data-now", "")


def test_the_microphone(open_page: Open, alone: Answerer, tmp_path: Path) -> None:
    page = open_page()
    page.get_by_role("button", name="Record").click()
    expect(page.locator("#elapsed")).to_have_text(re.compile(r"0:0[1-9]\.\d"))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#chosen .name")).to_have_text("recording-1.wav")
    recorded = tmp_path / "recording-1.wav"
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Save").click()
    waiting.value.save_as(recorded)
    samples, rate = soundfile.read(recorded)
    assert rate == 16000 and 1 < len(samples) / rate < 9 and samples.ndim == 1
    assert np.abs(samples).max() > 0.05
    (expected,) = direct(alone, clip=recorded)
    assert expected.text
    assert texts(ask(page, None)) == [expected.text]


def test_examples_come_before_the_question(open_page: Open, alone: Answerer) -> None:
    example = alone.shot(alone.listen(CLIPS[1]), ASK, "A dog.")
    (expected,) = direct(alone, shots=[example])
    page = open_page()
    page.get_by_text("Examples").click()
    page.set_input_files("#shot", CLIPS[1])
    page.set_input_files("#file", CLIP)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("An example has no answer yet.")
    page.get_by_label("Answer about transcribe-2.wav").fill("A dog.")
    card = ask(page, None)
    assert texts(card) == [expected.text]
    assert told(json.loads(download(card, "JSON")[1])) == told(expected)  # tokens_in, too
    card.get_by_role("button", name="Use as example").click()
    assert page.get_by_label("Answer about transcribe-1.wav").input_value() == expected.text


def test_on_a_phone(open_page: Open) -> None:
    page = open_page(viewport=PHONE)
    assert not wide(page)
    page.get_by_role("button", name="Write a question").click()
    page.get_by_label("Question").fill("Why" * 50)
    card = ask(page)
    page.get_by_text("API key").click()
    card.get_by_role("button", name="Use as example").click()
    assert not wide(page)


def test_with_a_key(open_page: Open, shipped: Checkpoint) -> None:
    with serving(shipped, api_keys=("secret",)) as locked:
        page = open_page(locked, refused=True)
        expect(page.get_by_role("alert")).to_contain_text("a key is needed")
        page.get_by_label("Key, kept until this tab is closed").fill("secret")
        page.get_by_label("Key, kept until this tab is closed").press("Tab")
        expect(page.locator("#model")).to_have_text("speechllm-tiny")
        page.reload()
        expect(page.locator("#model")).to_have_text("speechllm-tiny")
        assert texts(ask(page)) != [""]
