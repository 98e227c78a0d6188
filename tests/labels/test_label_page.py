"""The labelling page in headless Chromium: what a person does with keys and mouse is what the
labels file holds, and no text does anything.
"""

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf.labels.records import Export, Judgement, Verdict
from rlhf.labels.targets import page as target
from tests.labels.page_exports import CHAT, EVIL, ID, export_of, pairs, rankings

CHROMIUM = shutil.which(os.environ.get("CHROMIUM") or "chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium: install Debian's package chromium, or name a program with CHROMIUM",
    ),
]
QUIET = [
    f"--disable-{name}"
    for name in ("gpu", "quic", "background-networking", "component-update", "sync")
]
Opener = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--no-first-run", *QUIET]
        )
        yield running
        running.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    """opened(export, annotator="Ada") -> the page in a context of its own, begun by its annotator;
    annotator=None: on the first view.

    Whatever the page did, it made no request but for itself, and nothing was said on the console.
    """
    noise: list[str] = []
    contexts: list[Any] = []

    def open_page(
        export: Export,
        annotator: str | None = "Ada",
        *,
        init: str = "",
        context: Any = None,
        clock: bool = False,
        **options: Any,
    ) -> Any:
        url = target.write(export, tmp_path)[0].as_uri()
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
            context.set_default_timeout(10_000)
            contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: noise.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                noise.append(f"request: {request.url}")
                if request.url != url and not request.url.startswith("blob:")
                else 0
            ),
        )
        if init:
            page.add_init_script(init)
        if clock:
            page.clock.install()
        page.goto(url)
        if annotator is not None:
            begin(page, annotator)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert noise == []


def begin(page: Any, annotator: str) -> None:
    page.locator("#name").fill(annotator)
    page.locator("#name").press("Enter")
    page.locator("#bar").wait_for()


def at(page: Any, number: int) -> None:
    """Waits until the task is in view."""
    page.locator("#position", has_text=re.compile(rf"^Task {number} of ")).wait_for()


def until(page: Any, condition: str) -> None:
    """playwright's wait_for_function evaluates inside the page, which the page's policy forbids."""
    end = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never came true: {condition}"
        page.wait_for_timeout(20)


def keys(page: Any, *names: str) -> None:
    for name in names:
        page.keyboard.press(name)


def label(page: Any, first: int, *names: str) -> None:
    """Presses a key for task `first` and those behind it, and waits for each next one."""
    for number, name in enumerate(names, first):
        at(page, number)
        page.keyboard.press(name)
    until(page, "advancing === null")


def saved(
    page: Any, folder: Path, how: Callable[[], None] | None = None
) -> tuple[Path, list[Judgement]]:
    """The downloaded file and what is read from it, times and seconds checked and taken out."""
    with page.expect_download() as download:
        (how or (lambda: page.keyboard.press("d")))()
    place = folder / download.value.suggested_filename
    download.value.save_as(place)
    out = []
    for found in target.read(place):
        assert isinstance(found, Judgement), found
        assert found.seconds is not None and 0 <= found.seconds < 60
        assert (
            found.time is not None
            and abs(
                (datetime.now().astimezone() - datetime.fromisoformat(found.time)).total_seconds()
            )
            < 120
        )
        out.append(replace(found, seconds=None, time=None, place=""))
    return place, out


def judged(export: Export, number: int, verdict: Verdict, **fields: Any) -> Judgement:
    task = export.tasks[number - 1]
    return Judgement(
        task.id,
        fields.pop("annotator", "Ada"),
        verdict,
        prompt=task.prompt,
        shown=task.shown,
        **fields,
    )


def text_of(page: Any, selector: str) -> str:
    return str(page.locator(selector).inner_text())


# ---- labels ----


def test_keys_make_the_labels_that_are_downloaded_and_read(opened: Opener, tmp_path: Path) -> None:
    export = pairs(8)
    page = opened(export, "Ada  Łovelace ")
    label(page, 1, "1", "2", "t", "s", "ArrowLeft", "ArrowRight", "0")
    at(page, 8)
    keys(page, "c")
    page.keyboard.type("12 t s u? d\n", delay=0)  # no key does anything while a comment is written
    keys(page, "Escape")
    assert text_of(page, "#count") == "7 of 8 labelled, 1 left"
    keys(page, "1")
    page.locator("#done").wait_for()
    assert "All 8 tasks have a label, 1 of them skipped" in text_of(page, "#done")
    place, labels = saved(page, tmp_path, page.locator("#done-download").click)
    assert place.name == f"labels-{ID}-Ada-Łovelace.json"
    given = [
        Verdict.left,
        Verdict.right,
        Verdict.tie,
        Verdict.skip,
        Verdict.left,
        Verdict.right,
        Verdict.tie,
    ]
    expected = [
        judged(export, i, verdict, annotator="Ada Łovelace") for i, verdict in enumerate(given, 1)
    ]
    assert labels == [
        *expected,
        judged(export, 8, Verdict.left, annotator="Ada Łovelace", comment="12 t s u? d\n"),
    ]


def test_undo_goes_back_and_takes_the_label_off(opened: Opener, tmp_path: Path) -> None:
    export = pairs(4)
    page = opened(export)
    keys(page, "u")
    assert text_of(page, "#announcement") == "There is nothing to undo"
    label(page, 1, "1", "2", "1")
    at(page, 4)
    keys(page, "u")
    at(page, 3)
    assert text_of(page, "#count") == "2 of 4 labelled, 2 left"
    keys(page, "Backspace")
    at(page, 2)
    label(page, 2, "t")
    at(page, 3)
    assert saved(page, tmp_path)[1] == [
        judged(export, 1, Verdict.left),
        judged(export, 2, Verdict.tie),
    ]


def test_reload_resumes_where_it_was_and_warns_of_labels_in_no_file(
    opened: Opener, tmp_path: Path
) -> None:
    export = pairs(5)
    page = opened(export)
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    label(page, 1, "1", "2")
    at(page, 3)
    keys(page, "c")
    page.keyboard.type("half a thought")
    page.reload()
    at(page, 3)
    assert asked == ["beforeunload"]
    assert page.locator("#comment").input_value() == "half a thought"
    keys(page, "u")  # what came before the reload can be undone too
    at(page, 2)
    assert saved(page, tmp_path)[1] == [judged(export, 1, Verdict.left)]
    page.reload()
    at(page, 2)
    assert asked == ["beforeunload"]  # all labels are in a file now
    page.evaluate("sessionStorage.clear()")
    page.reload()  # as a new tab: asks who it is
    page.get_by_role("button", name="Ada").click()
    at(page, 2)


def test_labels_can_be_changed_and_tasks_left_and_found(opened: Opener, tmp_path: Path) -> None:
    export = pairs(4)
    page = opened(export)
    keys(page, "Enter")  # leaves task 1 without a label
    label(page, 2, "1", "1", "s")
    at(page, 1)  # the one that is left
    keys(page, "l")
    assert page.locator("#tasks button").count() == 4
    page.get_by_role("button", name="Without a label").click()
    assert page.locator("#tasks li").all_inner_texts() == ["1\nQuestion 1"]
    page.get_by_role("button", name="Skipped", exact=True).click()
    page.locator("#tasks button").click()
    at(page, 4)
    assert page.locator("[data-verdict=skip]").get_attribute("aria-pressed") == "true"
    page.locator("[data-verdict=right]").click()
    at(page, 1)
    keys(page, "Enter", "Enter", "Enter", "Enter")
    page.locator("#done").wait_for()
    assert "1 of 4 tasks have no label yet" in text_of(page, "#done")
    page.locator("#done-open").click()
    at(page, 1)
    assert saved(page, tmp_path)[1] == [
        judged(export, i, verdict)
        for i, verdict in ((2, Verdict.left), (3, Verdict.left), (4, Verdict.right))
    ]


def test_rankings_by_key_and_by_mouse(opened: Opener, tmp_path: Path) -> None:
    export = rankings(4)
    page = opened(export)
    keys(page, "3", "1", "t", "4", "Enter")
    assert "Some answers have no place yet" in text_of(page, "#announcement")
    keys(page, "2")
    assert text_of(page, "#order") == "3 > 1 = 4 > 2"
    keys(page, "Enter")
    at(page, 2)
    # ties by the same place; numbers may be left out
    for place, rank in ((0, 4), (1, 1), (2, 1), (3, 4)):
        page.locator(".answer").nth(place).locator(f"[data-rank='{rank}']").click()
    keys(page, "u", "u")
    assert text_of(page, "#order") == "2 > 1"
    # 3 and 4 get the free places 2 and 3; answer 2 is taken out and put in again
    keys(page, "3", "4", "2", "2", "Enter")
    at(page, 3)
    keys(page, "1", "s")
    at(page, 4)
    keys(page, "0")
    ranked = [
        judged(export, 1, Verdict.ranked, ranking=((2,), (0, 3), (1,))),
        judged(export, 2, Verdict.ranked, ranking=((1,), (2,), (3,), (0,))),
    ]
    equal = judged(export, 4, Verdict.ranked, ranking=((0, 1, 2, 3),))
    assert saved(page, tmp_path)[1] == [*ranked, judged(export, 3, Verdict.skip), equal]


def test_ratings_of_each_side(opened: Opener, tmp_path: Path) -> None:
    export = pairs(3, ratings=True, comments=False)
    page = opened(export)
    assert not page.locator("#comment").is_visible()
    keys(page, "1", "r", "4", "2", "Enter")  # with ratings a choice does not go on by itself
    at(page, 2)
    page.get_by_role("radio", name="5, very good").nth(1).check(force=True)
    page.get_by_role("radio", name="3, fair").nth(0).check(force=True)
    # the same again takes it off
    page.get_by_role("radio", name="3, fair").nth(0).click(force=True)
    keys(page, "2", "Enter")  # after a click digits choose again
    at(page, 3)
    keys(page, "t")
    rated = [
        judged(export, 1, Verdict.left, ratings=(4, 2)),
        judged(export, 2, Verdict.right, ratings=(None, 5)),
    ]
    assert saved(page, tmp_path)[1] == [*rated, judged(export, 3, Verdict.tie)]


def test_name_is_required(opened: Opener) -> None:
    page = opened(pairs(2), None)
    page.locator("#name").press("Enter")
    assert text_of(page, "#name-error") == "Please give your name: each label needs one."
    page.locator("#name").fill("   ")
    page.get_by_role("button", name="Start").click()
    assert not page.locator("#work").is_visible()
    page.locator("h1").first.click()
    keys(page, "1", "2", "Enter", "?")
    assert not page.locator("#work").is_visible() and not page.locator("#help").is_visible()
    begin(page, "12 stu")
    at(page, 1)
    assert text_of(page, "#count") == "0 of 2 labelled, 2 left"


def test_work_goes_on_on_another_computer(opened: Opener, tmp_path: Path) -> None:
    export = pairs(3)
    page = opened(export)
    label(page, 1, "1", "2")
    place, _ = saved(page, tmp_path)
    other = opened(export, None)
    for changes, told in (
        ({"export": "ffffffffffff"}, "belongs to the tasks ffffffffffff"),
        ({"version": 9}, "version 9"),
        ({"format": 1}, "no labels file"),
    ):
        wrong = tmp_path / "wrong.json"
        wrong.write_text(
            json.dumps(json.loads(place.read_text(encoding="utf-8")) | changes), encoding="utf-8"
        )
        other.locator("#file").set_input_files(wrong)
        other.get_by_text(told).wait_for()
    damaged = json.loads(place.read_text(encoding="utf-8"))
    damaged["labels"][1]["shown"][0] = "edited"
    wrong.write_text(json.dumps(damaged), encoding="utf-8")
    other.locator("#file").set_input_files(wrong)
    at(other, 2)
    assert (
        text_of(other, "#announcement")
        == "1 labels were read from the file. 1 did not fit this page and were left out."
    )
    keys(other, "?")
    other.locator("#leave").click()
    other.locator("#file").set_input_files(place)
    at(other, 3)
    keys(other, "t")
    other.locator("#done").wait_for()
    verdicts = (Verdict.left, Verdict.right, Verdict.tie)
    assert saved(other, tmp_path)[1] == [
        judged(export, i, verdict) for i, verdict in enumerate(verdicts, 1)
    ]


def test_two_tabs_of_one_annotator_share_their_labels(opened: Opener, tmp_path: Path) -> None:
    export = pairs(3)
    first = opened(export)
    second = opened(export, context=first.context)
    label(first, 1, "1")
    second.get_by_text("Labels were changed in another tab").wait_for()
    keys(second, "n")
    label(second, 2, "2")
    first.get_by_text("2 of 3 labelled").wait_for()
    assert saved(first, tmp_path)[1] == [
        judged(export, 1, Verdict.left),
        judged(export, 2, Verdict.right),
    ]


# ---- trouble ----


def test_browser_that_keeps_nothing_is_said_and_the_download_works(
    opened: Opener, tmp_path: Path
) -> None:
    export = pairs(2)
    page = opened(
        export,
        init="Storage.prototype.setItem = () => { throw new DOMException('no room', "
        "'QuotaExceededError'); };",
    )
    label(page, 1, "1")
    assert "does not keep your labels (QuotaExceededError: no room)" in text_of(page, "#problem")
    assert page.locator("#problem").get_attribute("role") == "alert"
    assert saved(page, tmp_path)[1] == [judged(export, 1, Verdict.left)]


def test_what_can_not_be_read_is_put_aside(opened: Opener) -> None:
    key = f"rlhf-labels {ID} Ada"
    page = opened(
        pairs(2),
        init=f"if (!localStorage.getItem({key!r})) localStorage.setItem({key!r}, '{{broken');",
    )
    assert "can't be read" in text_of(page, "#announcement")
    kept = page.evaluate(
        "Object.entries(localStorage).filter(([key]) => key.startsWith('unreadable'))"
    )
    assert [value for _, value in kept] == ["{broken"]


def test_time_counts_while_visible_and_a_pause_for_at_most_a_minute(
    opened: Opener, tmp_path: Path
) -> None:
    page = opened(pairs(3), clock=True)
    page.clock.pause_at(datetime.now().timestamp() * 1000 + 60_000)
    base = page.evaluate("(countTime(), labelHere().seconds)")

    def spent() -> float:
        return round(page.evaluate("(countTime(), labelHere().seconds)") - base, 1)

    page.clock.run_for(5_000)
    assert spent() == 5
    page.clock.run_for(600_000)
    assert spent() == 65
    page.evaluate(
        "Object.defineProperty(document, 'visibilityState', { value: 'hidden', configurable: "
        "true })"
    )
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.clock.run_for(30_000)
    page.evaluate(
        "delete document.visibilityState; document.dispatchEvent(new Event('visibilitychange'))"
    )
    assert spent() == 65
    keys(page, "?")
    page.clock.run_for(30_000)
    keys(page, "Escape")
    until(page, "clock.last !== null")
    page.clock.run_for(1_000)
    assert spent() == 66
    keys(page, "1")
    page.clock.run_for(1_000)
    with page.expect_download() as download:
        keys(page, "d")
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["labels"][0][
        "seconds"
    ] == pytest.approx(66 + base, abs=0.1)


# ---- texts ----


def test_texts_are_shown_and_do_nothing(opened: Opener, tmp_path: Path) -> None:
    chat = [{"role": "<b>user</b>", "content": EVIL}, {"role": "user", "content": EVIL}]
    export = export_of(
        [(EVIL, [EVIL, EVIL + "2"]), (chat, [EVIL, " "]), ("p", ["", "b"])],
        title=EVIL,
        instructions=EVIL,
    )
    page = opened(export, None)
    shown = EVIL.replace("\r\n", "\n")
    assert page.locator("#start-title").text_content() == shown
    assert page.locator("#start-instructions").text_content().strip() == shown.strip()
    begin(page, '<img src=x onerror="window.evil=1">')
    assert page.locator("#turns .text").text_content() == shown
    assert page.locator(".answer .text").all_text_contents() == [shown, shown + "2"]
    keys(page, "l", "Escape", "?", "Escape")
    label(page, 1, "1")
    at(page, 2)
    assert page.locator(".role").all_text_contents() == ["<b>user</b>", "User"]
    assert text_of(page, ".none") == "This text is nothing but white space."
    label(page, 2, "2")
    at(page, 3)
    assert text_of(page, ".none") == "This text is empty."
    assert page.evaluate("window.evil") is None
    assert (
        page.locator("main, dialog").locator("script, img, b, a, i, iframe, svg, style").count()
        == 0
    )
    _, labels = saved(page, tmp_path)
    assert [(found.prompt, found.shown) for found in labels] == [
        (task.prompt, task.shown) for task in export.tasks[:2]
    ]
    page.evaluate("sessionStorage.clear(); state.changed = false")
    page.reload()
    assert page.locator("#kept-names bdi").text_content() == '<img src=x onerror="window.evil=1">'


def test_policy_holds_in_the_browser(browser: Any, tmp_path: Path) -> None:
    """Even if a text did become markup or code: nothing runs and nothing leaves."""
    page = browser.new_page()
    gone: list[str] = []
    page.on("requestfinished", lambda request: gone.append(request.url))
    page.on("requestfailed", lambda request: gone.append(request.failure))
    url = target.write(pairs(1), tmp_path)[0].as_uri()
    page.goto(url)
    tries = [
        "document.body.innerHTML = '<b>x</b>'",
        "document.body.append(Object.assign(document.createElement('script'), {textContent: "
        "'window.evil = 1'}))",
        "fetch('https://example.invalid/')",
    ]
    for code in tries:
        with pytest.raises(Exception, match=r"TrustedHTML|TrustedScript|Failed to fetch"):
            page.evaluate(code)
    image = (
        "new Promise(done => { const i = new Image(); i.onerror = () => done('blocked'); "
        "i.src = 'https://example.invalid/a.png'; })"
    )
    assert page.evaluate(image) == "blocked"
    assert page.evaluate("window.evil") is None
    # the image was held back by the policy, the others before they became requests
    assert gone == [url, "csp"]
    page.close()


def test_white_space_and_roles_of_a_chat_stay(opened: Opener) -> None:
    page = opened(export_of([(CHAT, ["a\n\n    b\tc  d", "x\r\ny"])]))
    assert page.locator(".role").all_inner_texts() == ["System", "User", "Assistant", "User"]
    assert page.locator(".answer .text").all_inner_texts() == ["a\n\n    b\tc  d", "x\ny"]
    assert (
        page.locator(".answer .text")
        .first.evaluate("e => getComputedStyle(e).whiteSpace")
        .startswith("pre-wrap")
    )


def test_functions_stand_before_the_turns(opened: Opener) -> None:
    tools = [{"type": "function", "function": {"name": "<b>look</b>"}}]
    export = export_of([(CHAT, ["a", "b"]), (CHAT, ["c", "d"])])
    export = replace(export, tasks=(replace(export.tasks[0], tools=tools), export.tasks[1]))
    page = opened(export)
    assert page.locator(".role").first.inner_text() == "Functions that the answers may call"
    assert json.loads(page.locator("#turns .text").first.inner_text()) == tools
    page.keyboard.press("1")
    at(page, 2)
    assert page.locator(".role").first.inner_text() == "System"


def test_direction_marks_do_not_turn_the_layout(opened: Opener) -> None:
    boxes = (
        "() => [...document.querySelectorAll('button, h2, .answer, #position')].map(e => { "
        "const r = e.getBoundingClientRect(); return [r.x, r.y]; })"
    )
    plain = opened(export_of([("p", ["abc", "def"])]))
    turned = opened(export_of([("\u202ep", ["\u202eab\u2067c", "ש\u202bdef"])]))
    assert plain.evaluate(boxes) == turned.evaluate(boxes)
    assert (
        turned.locator(".answer .text").first.evaluate("e => getComputedStyle(e).unicodeBidi")
        == "plaintext"
    )
    assert turned.locator(".answer .text").nth(1).evaluate("e => e.matches(':dir(rtl)')")


# ---- how it looks ----

CONTRASTS = """() => {
  const parts = (color) => {
    const [r, g, b, a] = color.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a: a ?? 1 };
  };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = parts(getComputedStyle(e).backgroundColor);
      if (color.a > 0.99) return color.rgb;
    }
  };
  const out = {};
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.disabled || !e.checkVisibility() || e.closest('script')) continue;
    const lights = [light(parts(getComputedStyle(e).color).rgb), light(ground(e))];
    const [a, b] = lights.sort((x, y) => y - x);
    const name = `${e.tagName}#${e.id}.${e.className} ${e.textContent.trim().slice(0, 20)}`;
    out[name] = (a + 0.05) / (b + 0.05);
  }
  return out;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_schemes(opened: Opener, scheme: str) -> None:
    """WCAG 2.2 AA: at least 4.5 for text."""
    page = opened(pairs(2, ratings=True), None, color_scheme=scheme)
    found: dict[str, float] = dict(page.evaluate(CONTRASTS))
    begin(page, "Ada")
    keys(page, "1", "r", "3", "Escape")
    found |= page.evaluate(CONTRASTS)
    keys(page, "l")
    found |= page.evaluate(CONTRASTS)
    assert len(found) > 30
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}
    ground = [
        int(v)
        for v in re.findall(
            r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")
        )
    ]
    assert (sum(ground) < 150) is (scheme == "dark")


@pytest.mark.parametrize("made", [pairs, rankings])
def test_fits_a_narrow_screen(opened: Opener, made: Callable[..., Export]) -> None:
    page = opened(
        made(2, ratings=True, title="W" * 80),
        viewport={"width": 360, "height": 740},
        has_touch=True,
        is_mobile=True,
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    boxes = [box.bounding_box() for box in page.locator(".answer").all()]
    assert all(
        above["x"] == below["x"] and above["y"] < below["y"]
        for above, below in itertools.pairwise(boxes)
    )
    page.locator(".scale span").first.scroll_into_view_if_needed()
    inside = [button.bounding_box() for button in page.locator("button:visible").all()]
    assert all(
        box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 44 for box in inside
    )
    page.locator("[data-verdict=skip]").tap()
    at(page, 2)


def test_sides_weigh_the_same_and_long_answers_scroll_together(opened: Opener) -> None:
    page = opened(export_of([("word " * 3000, ["long line\n" * 300, "short"])]))
    left, right = (card.bounding_box() for card in page.locator(".answer").all())
    assert (left["width"], left["height"], left["y"]) == (
        right["width"],
        right["height"],
        right["y"],
    )
    first, second = (
        page.locator(f"[data-verdict={side}]").bounding_box() for side in ("left", "right")
    )
    assert (
        first["width"] == pytest.approx(second["width"], abs=1)
        and first["height"] == second["height"]
    )
    assert page.locator(".answer").first.evaluate("e => e.scrollHeight <= e.clientHeight")
    prompt = page.locator("#turns")
    assert prompt.bounding_box()["height"] < 300 and prompt.get_attribute("tabindex") == "0"
    page.get_by_role("button", name="Show the whole prompt").click()
    assert prompt.bounding_box()["height"] > 1000
    page.mouse.wheel(0, 4000)
    until(page, "window.scrollY > 1000")
    assert (
        page.locator("[data-verdict=left]").is_visible()
        and page.locator("#actions").bounding_box()["y"] < 800
    )


def test_controls_have_names_and_focus_shows(opened: Opener) -> None:
    page = opened(pairs(2, ratings=True))
    snapshot = page.locator("body").aria_snapshot()
    unnamed = re.findall(
        r"^\s*- (?:button|radio|textbox|progressbar|checkbox)(?::|$)", snapshot, re.MULTILINE
    )
    assert (
        unnamed == []
        and 'radio "4, good"' in snapshot
        and 'progressbar "Labelled tasks"' in snapshot
    )
    rings = (
        "(e => [e, e.nextElementSibling].some((x) => x && getComputedStyle(x).outlineStyle "
        "=== 'solid'))(document.activeElement)"
    )
    for _ in range(8):
        page.keyboard.press("Tab")
        assert page.evaluate(rings)
    keys(page, "?")
    page.locator("#shortcuts").uncheck()
    page.keyboard.press("Escape")
    keys(page, "1")
    assert text_of(page, "#count") == "0 of 2 labelled, 2 left"


def test_large_export_stays_quick(opened: Opener, tmp_path: Path) -> None:
    """2,000 tasks of 2 KB, 4.3 MB. Measured on 2 busy cores: 0.4 to 0.6 s to load, 37 to 45 ms for
    a step with its save, 0.2 s for the list.
    """
    text = "Some words of an answer that is long. " * 18
    export = export_of([(f"{i} {text}", [f"a{i} {text}", f"b{i} {text}"]) for i in range(2000)])
    page = opened(export)
    all_but_two = (
        "for (const t of data.tasks.slice(2)) state.labels.set(t.id, { ...blank(2), "
        "verdict: 'left', took: 1, time: new Date().toISOString() })"
    )
    page.evaluate(all_but_two)
    step = page.evaluate(
        "() => { const t = performance.now(); decide((l) => { l.verdict = 'left'; }); go(1); "
        "return performance.now() - t; }"
    )
    listing = page.evaluate(
        "() => { const t = performance.now(); openDialog('list'); document.body.offsetHeight; "
        "return performance.now() - t; }"
    )
    assert step < 500 and listing < 3000
    page.keyboard.press("Escape")
    label(page, 2, "2")
    page.locator("#done").wait_for()
    assert len(saved(page, tmp_path)[1]) == 2000
