"""The whole way by clicks alone, in headless Chromium: a file, its rows, SFT from nothing, the
curve, a reward model, PPO, a chat, an export.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.board import browsing
from tests.board.browsing import CHROMIUM, NO_CHROMIUM, Served, Visitor

pytestmark = [
    pytest.mark.browser,
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM),
]
RUN_MS = 600_000  # of a stage, on a busy machine
CHECK_MS = 60_000
COLOURS = ("red", "green", "blue", "grey", "black", "white", "brown", "pink")


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Served]:
    with browsing.served(tmp_path / "runs") as made:
        yield made


def rows_of(folder: Path) -> tuple[Path, Path]:
    """Files of examples and of pairs."""
    examples, pairs = folder / "examples.csv", folder / "pairs.csv"
    asked = [f"a {one} and {two} day" for one in COLOURS for two in COLOURS]
    examples.write_text("prompt,completion\n" + "".join(f"{q}, it is {q}\n" for q in asked))
    head = "prompt,chosen,rejected\n"
    pairs.write_text(head + "".join(f"{q}, it is {q}, no no no\n" for q in asked))
    return examples, pairs


def send(page: Any, path: Path) -> None:
    """A file by the data page; its own page is open then."""
    page.get_by_role("link", name="Data", exact=True).click()
    page.set_input_files("#file", path)
    page.get_by_role("button", name="Send").click()
    page.get_by_role("heading", name=path.name).wait_for(timeout=CHECK_MS)


def unfold(page: Any) -> None:
    """Every group of a form."""
    while page.locator("details.group:not([open]) > summary").count():
        page.locator("details.group:not([open]) > summary").first.click()


def fill(page: Any, **values: str) -> None:
    """Inputs by their option, with __ for a dot."""
    for key, value in values.items():
        field = page.locator("#f-" + key.replace("__", "-"))
        if field.evaluate("element => element.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)


def start(page: Any) -> None:
    """The dry run, the start, and the wait until the stage has ended."""
    page.get_by_role("button", name="Check before the start").first.click(timeout=CHECK_MS)
    page.get_by_text("The dry run passed").wait_for(timeout=CHECK_MS)
    page.get_by_role("button", name="Start", exact=True).click(timeout=CHECK_MS)
    page.wait_for_url("**/runs/clicks/*")
    page.locator(".state", has_text="ended").first.wait_for(timeout=RUN_MS)


def test_by_clicks_alone(board: Served, tmp_path: Path) -> None:
    examples, pairs = rows_of(tmp_path)
    runs = tmp_path / "runs"
    with browsing.browser() as running:
        visitor = Visitor(running, board)
        page = visitor.page
        # ---- a policy from nothing ----
        send(page, examples)
        assert "it is a red and red day" in page.locator("main").inner_text()
        page.get_by_role("link", name="Teach by examples (SFT)").click()
        unfold(page)
        fill(page, run__name="clicks", model="tiny", stage__epochs="1", stage__batch_size="8")
        start(page)
        assert page.locator("img.curve").count() > 0
        policy = runs / "clicks" / "sft" / "model"
        assert (policy / "config.json").is_file()
        # ---- a reward model ----
        send(page, pairs)
        page.get_by_role("link", name="Train a reward model").click()
        unfold(page)
        fill(page, run__name="clicks", model__path=str(policy))
        fill(page, stage__epochs="1", stage__batch_size="8")
        start(page)
        # ---- PPO ----
        page.get_by_role("link", name="Data", exact=True).click()
        page.get_by_role("link", name="pairs.csv").first.click()
        page.get_by_role("link", name="Train with a reward (PPO)").click()
        unfold(page)
        reward = runs / "clicks" / "reward" / "model"
        fill(page, run__name="clicks", model__path=str(policy), reward__path=str(reward))
        fill(page, rollout="hf", stage__steps="2", stage__prompts_per_step="4")
        fill(page, rollout__max_response_length="8")
        start(page)
        # ---- chat and export ----
        page.get_by_role("link", name="Models").click()
        model = page.locator("article", has=page.get_by_role("link", name="clicks/ppo"))
        model.first.get_by_role("link", name="Chat").click()
        page.locator("details > summary").first.click()
        page.select_option("#template", "plain")
        page.get_by_role("button", name="Begin").click()
        page.fill("#message", "a red and blue day")
        page.get_by_role("button", name="Send", exact=True).click()
        page.locator(".turn.assistant").wait_for(timeout=CHECK_MS)
        page.locator("#message").wait_for(timeout=CHECK_MS)
        page.get_by_role("link", name="Models").click()
        model.first.get_by_role("link", name="Merge or export").click()
        start(page)
        assert (runs / "clicks" / "export" / "model" / "config.json").is_file()
        assert visitor.noise == []
