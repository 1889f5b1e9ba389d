"""The page in a real browser, against a real server on a tiny backbone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slm.serving.keys import add_key
from slm.tasks.task import check_name
from tests.serving.conftest import fresh_model, serving
from tests.serving.stores import FRENCH, SUM, make_store

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PATIENCE_MS = 60_000
OUTSIDE = 20 * "!?"
RUNNING = ".answer-text.running"

Open = Callable[..., "playwright.Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser) -> Iterator[Open]:
    """Opens pages whose every complaint, of the content policy say, fails the test.

    That a key is wanted, or not meant for teaching, is no fault of the page.
    """
    contexts, complaints = [], []

    def note(message) -> None:
        if message.type in ("error", "warning") and not any(
            f"status of {code}" in message.text for code in (401, 403)
        ):
            complaints.append(message.text)

    def make(address: str, width: int = 1280, scheme: str = "light"):
        viewport = {"width": width, "height": 800}
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        return page

    yield make
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")
    answered(page)


def answered(page) -> None:
    page.wait_for_selector(".origin-words")
    page.wait_for_selector(RUNNING, state="detached")
    page.wait_for_selector(".asked.current")
    page.wait_for_selector(".retrieval tbody tr")


def active(page, what: str) -> str:
    return str(page.evaluate(f"document.activeElement.{what}"))


def test_an_answer_shows_what_was_retrieved_and_where_the_question_lies(open_page, address):
    page = open_page(address)
    ask(page, SUM)
    assert page.inner_text(".origin-words").startswith("Answered from sums alone.")
    assert page.inner_text(".retrieval tbody tr:first-child .task-name") == "sums"
    assert page.inner_text(".retrieval tbody tr:first-child .number") == "100%"
    assert "within reach" in page.inner_text(".retrieval tbody tr:first-child")
    assert "too far" in page.inner_text(".retrieval tbody tr:last-child")
    assert page.inner_text("#map-told") == "Your question (ringed) is nearest to sums."
    named = {label.text_content() for label in page.query_selector_all(".key-label")}
    assert named
    assert named <= {"languages", "moods", "sums", "cooking"}


def test_a_question_of_no_task_is_told_as_refused(open_page, tmp_path, tiny, tiny_folder):
    # A tiny backbone with random weights hardly tells texts apart, so the store is a strict one.
    folder = make_store(tmp_path / "strict", tiny, false_refusal_rate=0.3).store.path
    with serving(fresh_model(folder, tiny_folder)) as strict:
        page = open_page(strict)
        ask(page, SUM)
        ask(page, OUTSIDE)
        assert "belongs to no task" in page.inner_text(".origin-words")
        assert page.query_selector(".asked.current.refused") is not None
        assert page.inner_text(".earlier-question") == SUM


def test_a_question_and_a_name_are_text_and_never_html(open_page, address):
    page = open_page(address)
    ask(page, FRENCH + ' <img src="x" onerror="document.title=1"><script>document.title=2</script>')
    assert "<img src=" in page.inner_text(".question")
    assert page.query_selector("main img, main script") is None
    assert page.title() == "slm"


def test_everything_is_reached_with_the_keyboard_alone(open_page, store, tiny_folder):
    with serving(fresh_model(store, tiny_folder), is_teaching=True) as address:
        page = open_page(address)
        page.wait_for_selector(".plane svg")
        page.wait_for_selector("[aria-label='Forget cooking']")
        page.keyboard.press("Tab")
        assert active(page, "textContent") == "Skip to the question"
        page.keyboard.press("Enter")
        page.keyboard.type(SUM)
        assert active(page, "id") == "question"
        page.keyboard.press("Enter")
        answered(page)
        reached: list[str] = []
        while "Forget cooking" not in reached:
            page.keyboard.press("Tab")
            reached.append(active(page, "getAttribute('aria-label') ?? document.activeElement.textContent"))
            assert len(reached) < 60, reached
            if reached[-1].startswith("Map of"):
                page.keyboard.press("ArrowRight")
                assert page.inner_text("#map-told") == "The key of languages."
        assert {"Ask", "How to read it", "Learned"} <= set(reached)
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog[open]")
        assert active(page, "textContent") == "Keep it"
        page.keyboard.press("Escape")
        page.wait_for_selector("dialog", state="detached")
        assert active(page, "getAttribute('aria-label')") == "Forget cooking"


def test_where_teaching_is_off_the_page_says_how_to_turn_it_on_and_offers_none(open_page, address, tiny):
    page = open_page(address)
    page.wait_for_selector(".tasks tbody tr")
    page.wait_for_selector("#teach code:has-text('--allow-teaching')")
    assert page.query_selector(".drop, .row-actions, input[type=file]") is None
    page.click("text=Length and temperature")
    longest = page.locator("label:has-text('Longest answer') input")
    assert longest.get_attribute("max") == str(tiny.window - 1)
    longest.fill("9999")
    longest.press("Tab")
    assert longest.input_value() == str(tiny.window - 1)


def test_the_name_proposed_for_a_file_is_one_that_a_task_may_have(open_page, store, tiny_folder, tmp_path):
    wanted = {
        "My data (2).jsonl": "my-data-2",
        "_Überblick 2026.JSONL": "berblick-2026",
        70 * "A" + ".jsonl": 64 * "a",
        63 * "a" + " b.jsonl": 63 * "a",
    }
    with serving(fresh_model(store, tiny_folder), is_teaching=True) as address:
        page = open_page(address)
        for file_name, name in wanted.items():
            page.wait_for_selector(".drop")
            file = tmp_path / file_name
            file.write_text('{"text": "a", "label": "b"}\n')
            choose(page, file)
            check_name(name)
            assert page.input_value(".confirm input") == name
            assert page.is_enabled(".confirm .primary")
            page.fill(".confirm input", "Recipes")
            assert page.inner_text("#name-hint").startswith("Use 1 to 64 of a-z")
            assert page.is_disabled(".confirm .primary")
            page.click(".confirm .actions .quiet")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_scrolls_in_one_direction_only(open_page, address, scheme):
    page = open_page(address, width=360, scheme=scheme)
    ask(page, "what is " + 60 * "9" + " plus 4?")
    page.wait_for_selector(".matrix")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.documentElement).{n}") for n in ("color", "background")
    )
    is_dark = sum(map(int, paper[4 : paper.index(")")].split(","))) < sum(map(int, ink[4:-1].split(",")))
    assert is_dark == (scheme == "dark")


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(open_page, store, tiny_folder, tmp_path):
    key = add_key(tmp_path / "keys.json", "reader", ["ask"])
    with serving(fresh_model(store, tiny_folder), keys_file=tmp_path / "keys.json") as address:
        page = open_page(address)
        page.wait_for_selector("#key-form input")
        page.wait_for_selector("text=Waiting for a key")
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        page.wait_for_selector(".tasks tbody tr")
        ask(page, SUM)
        assert page.evaluate("Object.values(sessionStorage)") == [key]
        assert page.evaluate("localStorage.length + document.cookie.length") == 0


def test_a_dropped_file_is_learned_before_one_s_eyes_and_forgotten_again(
    open_page, store, tiny_folder, tmp_path
):
    folder = shutil.copytree(store, tmp_path / "store")
    wrong, right = tmp_path / "wrong.jsonl", tmp_path / "rivers.jsonl"
    wrong.write_text('{"text": "a", "label": "b"}\n{"word": 1}\n')
    rows = [
        {"text": f"the river {i} flows to the sea", "label": "<b>long</b>" if i % 2 else "short"}
        for i in range(12)
    ]
    right.write_text("\n".join(map(json.dumps, rows)))
    with serving(fresh_model(folder, tiny_folder), is_teaching=True) as address:
        page = open_page(address)
        page.wait_for_selector(".tasks tbody tr")
        page.wait_for_selector(".drop")
        choose(page, wrong)
        assert page.inner_text("#teach [role=alert]").startswith("Line 2 has word:")
        choose(page, right)
        assert page.inner_text(".preview li:nth-child(2) .preview-answer") == "<b>long</b>"
        page.fill(".confirm input[type=number]", "1")
        page.click("text=Teach it")
        page.wait_for_selector(".job progress")
        # The job is a process of its own, which has to load everything first.
        page.wait_for_selector(".job.succeeded", timeout=4 * PATIENCE_MS)
        page.wait_for_selector("[aria-label='Forget rivers']")
        page.wait_for_selector(".key-label:has-text('rivers')")
        page.click("[aria-label='Forget rivers']")
        page.click("text=Forget it")
        page.wait_for_selector("[aria-label='Forget rivers']", state="detached")
        page.wait_for_selector(".key-label:has-text('rivers')", state="detached")


def choose(page, file: Path) -> None:
    """Drop a file on the page, as a hand would."""
    handle = page.evaluate_handle(
        "([name, text]) => { const data = new DataTransfer();"
        " data.items.add(new File([text], name)); return data; }",
        [file.name, file.read_text()],
    )
    page.dispatch_event(".drop", "drop", {"dataTransfer": handle})
    page.wait_for_selector("#teach [role=alert], .preview")
