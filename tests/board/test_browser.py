"""The board in headless Chromium: no barrier that axe-core knows, no word on the console, no
request to another host; all of it by keyboard; labels of an annotator land on the server.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil
import pytest

from tests.board import browsing
from tests.board.browsing import CHROMIUM, NO_CHROMIUM, Served, Visitor, violations
from tests.board.furnished import furnish
from tests.labels.page_exports import ID

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]
MOST_MIB = 300
LOADING_MS = 120_000  # of a model's process, on a busy machine
FORMS = ("sft", "dpo", "reward", "ppo", "grpo", "eval", "label", "export", "data", "serve")
PAGES = {
    "start": "/",
    "data": "/data",
    "file": "/data/file/pairs.csv",
    "tokens": "/data/file/pairs.csv?model={model}",
    "delete": "/data/file/pairs.csv/delete",
    "labels": "/labels",
    "export": "/labels/people/label",
    "chat": "/chat",
    "models": "/models",
    "doctor": "/doctor",
    "missing": "/none",
    "runs": "/runs",
    "run": "/runs/demo",
    "stage": "/runs/demo/sft",
    **{f"new-{stage}": f"/new/{stage}" for stage in FORMS},
}
# Elements that the Tab key should reach.
FOCUSABLE = (
    "main :is(a[href], button, input, select, textarea, summary, [tabindex='0'])"
    ":not([type=hidden], :disabled, [tabindex='-1'])"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("board"))


@pytest.fixture(scope="module")
def board(runs: Path) -> Iterator[Served]:
    with browsing.served(runs) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing.browser() as running:
        yield running


@pytest.fixture
def visit(browser: Any, board: Served) -> Iterator[Callable[..., Visitor]]:
    visitors: list[Visitor] = []

    def enter(language: str = "en", **options: Any) -> Visitor:
        visitors.append(Visitor(browser, board, language, **options))
        return visitors[-1]

    yield enter
    noise = [line for visitor in visitors for line in visitor.noise]
    for visitor in visitors:
        visitor.close()
    assert noise == []


def path_of(name: str, runs: Path) -> str:
    return PAGES[name].format(model=runs / "demo" / "sft" / "model")


def dry_run(visitor: Visitor, runs: Path, run: str) -> Any:
    """The page before the start of a small DPO, with a warning."""
    query = {
        "run.name": run,
        "data.path": str(runs / ".board" / "uploads" / "pairs.csv"),
        "model.path": str(runs / "demo" / "sft" / "model"),
        "stage.batch_size": "2",
        "stage.max_length": "64",
        "stage.learning_rate": "1",
    }
    page = visitor.open("/new/dpo?" + urlencode(query))
    page.locator("button.primary").first.click()
    page.locator("form[action='/new/dpo/start'] button").wait_for(timeout=LOADING_MS)
    return page


# ---- barriers ----


@pytest.mark.parametrize(
    ("language", "scheme"),
    [
        ("en", "light"),
        ("zh", "dark"),
        pytest.param("en", "dark", marks=pytest.mark.full),
        pytest.param("zh", "light", marks=pytest.mark.full),
    ],
)
def test_no_barrier_on_any_page(visit: Any, runs: Path, language: str, scheme: str) -> None:
    found = []
    visitor = visit(language, color_scheme=scheme)
    for name in PAGES:
        page = visitor.open(path_of(name, runs))
        assert page.locator("html").get_attribute("lang") == language
        found += violations(page)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("language", ["zh", pytest.param("en", marks=pytest.mark.full)])
def test_no_barrier_before_a_start_and_for_an_annotator(
    visit: Any, browser: Any, runs: Path, language: str
) -> None:
    """The dry run's page, and the one that an annotator's link opens; a form with a problem."""
    visitor = visit(language)
    page = dry_run(visitor, runs, f"looked-{language}")
    found = violations(page)
    if language == "zh":  # but for commands, names and the rows themselves
        shown = page.locator("main [lang=en]")
        assert [shown.nth(i).inner_text() for i in range(shown.count())] == []
    page = visitor.open("/new/dpo?stage.beta=-1&stage.label_smoothing=0.1")
    page.locator(".message.problems").wait_for()
    found += violations(page)
    owner = visitor.open("/labels/people/label")
    owner.fill("#name", f"Reader {language}")
    owner.locator("form[action$='/annotators'] button").click()
    link = owner.locator("a[href^='/annotate/']").last.get_attribute("href")
    context = browser.new_context()
    page = context.new_page()
    page.goto(visitor.board.url + link)
    found += violations(page)
    page.get_by_role("button").last.click()
    page.locator("#position").wait_for()
    found += violations(page)
    context.close()
    assert not found, "\n".join(found)


def test_narrow_screens_need_no_sideways_scroll(visit: Any, runs: Path) -> None:
    visitor = visit(viewport={"width": 360, "height": 700})
    wide = []
    for name in PAGES:
        page = visitor.open(path_of(name, runs))
        if page.evaluate("document.documentElement.scrollWidth > innerWidth + 1"):
            wide.append(name)
    assert wide == []


def test_every_control_is_reached_by_tab(visit: Any, runs: Path) -> None:
    visitor = visit()
    rooms = ("start", "data", "file", "labels", "export", "chat", "models", "doctor")
    for name in (*rooms, "runs", "run", "stage", "new-sft"):
        page = visitor.open(path_of(name, runs))
        wanted = page.locator(FOCUSABLE)
        visible = [i for i in range(wanted.count()) if wanted.nth(i).is_visible()]
        page.evaluate(
            "selector => document.querySelectorAll(selector).forEach((element, i) => "
            "element.dataset.number = i)",
            FOCUSABLE,
        )
        reached = set()
        for _ in range(len(visible) + 40):
            page.keyboard.press("Tab")
            number = page.evaluate("document.activeElement.dataset.number")
            if number is not None:
                reached.add(int(number))
        assert set(visible) <= reached, name


def test_a_choice_by_keyboard(visit: Any) -> None:
    """Language, skip link, disclosure: Tab, Enter and Space alone."""
    page = visit().open("/chat")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "model"
    page.locator("summary").first.focus()
    page.keyboard.press("Space")
    assert page.locator("#temperature").is_visible()
    page.locator(".languages button").nth(1).focus()
    page.keyboard.press("Enter")
    page.locator("html[lang=zh]").wait_for()


# ---- rooms ----


def test_a_file_is_sent_and_deleted(visit: Any, tmp_path: Path) -> None:
    page = visit().open("/data")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi", "completion": "<img src=x onerror=alert(1)>"}\n')
    page.set_input_files("#file", rows)
    page.get_by_role("button", name="Send").click()
    page.get_by_role("heading", name="rows.jsonl").wait_for()
    assert "<img src=x" in page.locator("dl.cells").first.inner_text()
    page.get_by_role("link", name="Delete").click()
    page.get_by_role("button", name="Delete the file").click()
    page.wait_for_url("**/data")
    assert page.get_by_role("link", name="rows.jsonl").count() == 0


def test_a_chat_with_a_blind_choice(visit: Any, runs: Path) -> None:
    page = visit().open("/chat")
    page.get_by_role("link", name="demo/sft").click()
    page.locator("summary").first.click()
    page.select_option("#template", "plain")
    page.fill("#temperature", "3")  # or both answers would be empty
    page.get_by_role("button", name="Begin").click()
    page.fill("#message", "go on")
    page.get_by_role("button", name="Send and compare two answers").click()
    page.get_by_role("button", name="Answer 2 is better").click(timeout=LOADING_MS)
    page.fill("#message", "no")
    page.get_by_role("button", name="Send", exact=True).click()
    page.locator("#message").wait_for(timeout=LOADING_MS)
    assert not violations(page)
    page.get_by_role("button", name="Save as training data").click()
    page.locator(".message[role=status]").wait_for()
    assert (runs / "demo" / "chats" / "sft.jsonl").is_file()


def test_an_annotator_labels_on_the_server(visit: Any, browser: Any, runs: Path) -> None:
    """The link opens in a browser that nobody let in; the labels are on the server, and are gone on
    with in another browser.
    """
    visitor = visit()
    owner = visitor.open("/labels/people/label")
    owner.fill("#name", "Ada")
    owner.get_by_role("button", name="Add", exact=True).click()
    links = owner.locator("a[href^='/annotate/']")
    link = links.last.get_attribute("href")
    kept = runs / ".board" / "labels" / ID / "files" / f"{links.count()}.json"
    for number, key in enumerate("12"):
        context = browser.new_context()
        page = context.new_page()
        noise: list[str] = []
        page.on("console", lambda message, noise=noise: noise.append(message.text))
        page.goto(visitor.board.url + link)
        assert page.locator("#name").input_value() == "Ada"
        page.get_by_role("button", name="Start").click()
        page.locator("#position", has_text=f"Task {number + 1} of 3").wait_for()
        with page.expect_response(lambda answer: answer.request.method == "POST"):
            page.keyboard.press(key)
        page.locator("#position", has_text=f"Task {number + 2} of 3").wait_for()
        page.wait_for_timeout(1200)  # the task in view is saved, too
        assert noise == []
        context.close()
        assert len(json.loads(kept.read_text())["labels"]) == number + 1
    owner.reload()
    assert "2 of 3" in owner.locator("main").inner_text()
    assert not violations(owner)


def test_memory_of_the_board(board: Served) -> None:
    """After all of the above: models and files were read in processes of their own. The time until
    it answers is told only: machines differ.
    """
    process = psutil.Process(board.process.pid)
    resident = process.memory_info().rss / 2**20
    print(f"board: ready after {board.ready_s:.1f} s, {resident:.0f} MiB")
    assert resident < MOST_MIB
    assert not [m.path for m in process.memory_maps() if "libtorch" in m.path]
