"""Episodes: what is written and observed, limits, failures, seeds; with generators that write what
they are told, and with real ones.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.environments import Whole
from conf.reward import EnvironmentConfig, EnvironmentKind, OnTimeout
from rlhf.models.conversations import encode_conversation
from rlhf.models.encoding import IGNORED, prompt_ids
from rlhf.models.joining import Joiner
from rlhf.models.loading import train_tokenizer
from rlhf.models.templates import template_text
from rlhf.types import Message, Prompt, Rollout, UserError
from rollout.episode import Episode, seed_of
from rollout.episodes import EpisodeGenerator
from tests.acting import Async, Broken, Counting, Scripted, ScriptedServer, Slow, Tool
from tests.rollout.test_rollout import config, forward_logprobs, make, worst

BACKENDS = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    out = train_tokenizer(["the film is good", "user assistant system"] * 2, 400, 512)
    out.chat_template = template_text("hermes")
    return out


@pytest.fixture(autouse=True)
def none_made() -> None:
    Counting.made.clear()


def limits(**changes: Any) -> EnvironmentConfig:
    settings = EnvironmentConfig(
        kind=EnvironmentKind.python, path="tests.acting:Counting", max_tokens=200, step_limit_s=5
    )
    return dataclasses.replace(settings, **changes)


def asked(tokenizer: Any, name: str = "p", **fields: object) -> Prompt:
    source: list[Message] = [{"role": "user", "content": f"Count {name}"}]
    ids = tuple(prompt_ids(tokenizer, source))
    return Prompt(name, tokenizer.decode(ids), ids, source, fields)


def around(
    inner: Any, environment: Callable[[], Any] = Counting, *, turn: int = 64, **changes: Any
) -> EpisodeGenerator:
    settings = limits(**changes)
    tokenizer = inner.tokenizer
    return EpisodeGenerator(inner, tokenizer, settings, environment, max_prompt=100, max_turn=turn)


def letters(tokenizer: Any, text: str) -> list[int]:
    """A text one character a token, as no tokenizer writes it, and the end."""
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in text]
    return [*(i for letter in ids for i in letter), tokenizer.eos_token_id]


def observed(tokenizer: Any, text: str) -> list[int]:
    return Joiner(tokenizer).observation_ids([{"role": "user", "content": "x"}], text)


# ---- what an episode holds ----


@pytest.mark.parametrize("kind", [Scripted, ScriptedServer])
def test_an_episode_token_by_token(tokenizer: Any, kind: type[Scripted]) -> None:
    inner = kind(tokenizer, lambda name, turn: letters(tokenizer, "ab"[turn] * (turn + 1)))
    generator = around(inner)
    (rollout,) = generator.generate([asked(tokenizer, turns=2)], seed=3)
    a, b, end = (tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in ("a", "b", "x"))
    end = tokenizer.eos_token_id
    between = observed(tokenizer, "no 1")
    assert rollout.token_ids == [a, end, *between, b, b, end]
    assert rollout.prompt == asked(tokenizer, turns=2)
    first, last = rollout.turns
    stop = len(rollout.token_ids)
    assert (first.start, first.end, first.text, first.reward) == (0, 2, "a", 0.5)
    assert (last.start, last.end, last.text, last.reward) == (stop - 3, stop, "bb", 1.0)
    assert first.observation == tokenizer.decode(between) and last.observation == ""
    assert rollout.written == [True] * 2 + [False] * len(between) + [True] * 3
    assert rollout.rollout_logprobs == [-0.5] * 2 + [0.0] * len(between) + [-1.5] * 3
    assert (rollout.length, rollout.finish_reason, rollout.truncated) == (5, "stop", False)
    assert rollout.success is True and rollout.info == {"letters": 3.0}
    assert (rollout.text, rollout.version, rollout.versions) == ("bb", 0, None)
    (environment,) = Counting.made
    assert environment.said == ["a", "bb"] and environment.closed == 1
    assert environment.row == {"prompt": asked(tokenizer).source, "turns": 2}


def check_turns_stay(tokenizer: Any) -> None:
    """Each turn's prompt is what was read and written before, token for token."""
    inner = Scripted(tokenizer, lambda name, turn: letters(tokenizer, "the film"))
    (rollout,) = around(inner).generate([asked(tokenizer)], seed=3)
    whole = (*rollout.prompt.token_ids, *rollout.token_ids)
    for turn, ([prompt], _, _) in zip(rollout.turns, inner.calls, strict=True):
        start = len(rollout.prompt.token_ids) + turn.start
        assert prompt.token_ids == whole[:start]
        assert whole[start:][: turn.end - turn.start] == tuple(letters(tokenizer, "the film"))


def test_what_was_written_is_never_tokenised_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_turns_stay(tokenizer)
    # as a fault: the conversation so far is rendered and tokenised anew
    real = Episode.next_prompt

    def again(self: Episode) -> Prompt:
        prompt = real(self)
        text = tokenizer.decode(prompt.token_ids)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        return dataclasses.replace(prompt, token_ids=ids)

    monkeypatch.setattr(Episode, "next_prompt", again)
    with pytest.raises(AssertionError):
        check_turns_stay(tokenizer)


def test_the_environments_beginning_and_roles(tokenizer: Any) -> None:
    inner = Scripted(tokenizer, lambda name, turn: letters(tokenizer, "a"))
    generator = around(inner, lambda: Tool("Begin."))
    (rollout,) = generator.generate([asked(tokenizer, turns=2)], seed=3)
    source = [{"role": "user", "content": "Count p"}, {"role": "user", "content": "Begin."}]
    assert rollout.prompt.source == source
    assert list(rollout.prompt.token_ids) == prompt_ids(tokenizer, source)
    assert "<tool_response>\nno 1" in rollout.turns[0].observation
    with pytest.raises(UserError, match=r"prompt p.*max_prompt_length=100"):
        around(inner, lambda: Counting("Begin. " * 100)).generate([asked(tokenizer)], seed=3)


def test_a_text_goes_on_as_a_text(tokenizer: Any) -> None:
    inner = Scripted(tokenizer, lambda name, turn: letters(tokenizer, "a"))
    prompt = Prompt("t", "one", tuple(prompt_ids(tokenizer, "one")), "one")
    (rollout,) = around(inner).generate([prompt], seed=3)
    text = tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
    assert text == "ano 1ano 2a" and len(rollout.turns) == 3


@pytest.mark.parametrize("told", [False, True], ids=["texts", "calls"])
def test_what_is_imitated_is_what_is_sampled(tokenizer: Any, told: bool) -> None:
    """An SFT row of the same conversation has the same tokens, and the same mask."""
    said = ["I look.", "It is good."]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    written = list(said)
    if told:
        written[0] = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    ends = [tokenizer.eos_token_id]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + ends for text in written]
    inner = Scripted(tokenizer, lambda name, turn: ids[turn])
    (rollout,) = around(inner, Tool).generate([asked(tokenizer, turns=2)], seed=3)
    first: Message = {"role": "assistant", "content": said[0]}
    if told:
        first = {"role": "assistant", "content": "", "tool_calls": [call]}
    row: list[Message] = [
        {"role": "user", "content": "Count p"},
        first,
        {"role": "tool", "name": "f", "content": "no 1"},
        {"role": "assistant", "content": said[1]},
    ]
    row_ids, labels = encode_conversation(tokenizer, row, completion_only=True)
    prompt = list(rollout.prompt.token_ids)
    assert row_ids == prompt + rollout.token_ids
    trained = [label != IGNORED for label in labels]
    assert trained == [False] * len(prompt) + rollout.written


# ---- limits ----


def test_what_ends_an_episode(tokenizer: Any) -> None:
    def write(name: str, turn: int) -> list[int]:
        return letters(tokenizer, "abc")[: 3 if name.startswith("cut") and turn == 1 else 4]

    prompts = [asked(tokenizer, name, turns=4) for name in ("short", "cut")]
    prompts.append(asked(tokenizer, "long", turns=9))
    between = len(observed(tokenizer, "no 1"))
    short, cut, long = around(Scripted(tokenizer, write), max_turns=5).generate(prompts, seed=1)
    assert (short.finish_reason, len(short.turns)) == ("stop", 4)
    assert (cut.finish_reason, len(cut.turns), cut.truncated) == ("length", 2, True)
    assert cut.turns[-1].reward == 1.0, "a turn that was cut is rewarded too"
    assert (long.finish_reason, len(long.turns), long.truncated) == ("turns", 5, True)
    assert [environment.closed for environment in Counting.made] == [1, 1, 1]
    # one token is left for the second turn, then none
    for left, turns in ((1, 2), (0, 1)):
        inner = Scripted(tokenizer, write)
        tokens = 4 + between + left
        (rollout,) = around(inner, max_tokens=tokens).generate([prompts[0]], seed=1)
        assert (rollout.finish_reason, len(rollout.turns)) == ("length", turns)
        assert len(rollout.token_ids) == (tokens if left else 4)
        assert inner.calls[-1][0][0].limit == (1 if left else 64 if tokens > 64 else tokens)
    inner = Scripted(tokenizer, write)
    (rollout,) = around(inner, turn=2).generate([prompts[0]], seed=1)
    assert (rollout.finish_reason, len(rollout.token_ids)) == ("length", 2)
    assert inner.calls[0][0][0].limit == 2


@pytest.mark.parametrize("kind", [Scripted, ScriptedServer])
@pytest.mark.parametrize("environment", [Slow, Async])
def test_an_environment_that_hangs(
    tokenizer: Any, environment: type[Counting], kind: type[Scripted]
) -> None:
    inner = kind(tokenizer, lambda name, turn: letters(tokenizer, "a"))
    prompts = [asked(tokenizer, "slow", slow=1.5), asked(tokenizer, "quick")]
    began = time.monotonic()
    slow, quick = around(inner, environment, step_limit_s=0.3).generate(prompts, seed=1)
    assert time.monotonic() - began < 1.3
    assert (slow.finish_reason, len(slow.turns), slow.turns[0].reward) == ("time", 1, 0.0)
    assert (slow.truncated, slow.success) == (True, None)
    assert slow.turns[0].took_s >= 0.3 > max(turn.took_s for turn in quick.turns)
    assert (quick.finish_reason, len(quick.turns)) == ("stop", 3)
    hanging = next(made for made in Counting.made if made.row.get("slow"))
    deadline = time.monotonic() + 5
    while not hanging.closed and time.monotonic() < deadline:
        time.sleep(0.02)
    assert hanging.closed == 1, "it is closed when its thread comes back"
    generator = around(inner, environment, step_limit_s=0.2, on_timeout=OnTimeout.stop)
    with pytest.raises(UserError, match=r"prompt slow .*turn 1, .*step_limit_s=0\.2"):
        generator.generate(prompts, seed=1)


def test_environments_answer_side_by_side(tokenizer: Any) -> None:
    inner = Scripted(tokenizer, lambda name, turn: letters(tokenizer, "a"))
    prompts = [asked(tokenizer, str(i), slow=0.2, turns=1) for i in range(8)]
    began = time.monotonic()
    written = around(inner, Slow, workers=8).generate(prompts, seed=1)
    together = time.monotonic() - began
    assert together < 0.8  # one after the other: 1.6 s
    assert min(episode.turns[0].took_s for episode in written) >= 0.2
    began = time.monotonic()
    around(inner, Slow, workers=2).generate(prompts, seed=1)
    assert time.monotonic() - began > 0.75


@pytest.mark.parametrize("kind", [Scripted, ScriptedServer])
def test_an_episode_is_told_of_when_it_ends(tokenizer: Any, kind: type[Scripted]) -> None:
    """Not its turns, and not when all have ended."""
    inner = kind(tokenizer, lambda name, turn: letters(tokenizer, "a"))
    generator = around(inner)
    told: list[tuple[int, Rollout]] = []
    generator.arrived = lambda rollout: told.append((len(inner.calls), rollout))
    prompts = [asked(tokenizer, "long", turns=3), asked(tokenizer, "short", turns=1)]
    rollouts = generator.generate(prompts, seed=1)
    assert {id(rollout) for _, rollout in told} == {id(rollout) for rollout in rollouts}
    turns = [len(rollout.turns) for _, rollout in told]
    assert sorted(turns) == [1, 3]
    if kind is Scripted:  # threads may end in any order
        assert turns == [1, 3] and told[0][0] < told[1][0], "the long one goes on"


# ---- failures ----


@pytest.mark.parametrize("kind", [Scripted, ScriptedServer])
def test_what_an_environment_raises_stops_the_run(tokenizer: Any, kind: type[Scripted]) -> None:
    inner = kind(tokenizer, lambda name, turn: letters(tokenizer, "my text"))
    prompts = [asked(tokenizer, "fine"), asked(tokenizer, "bad", broken=2)]
    expected = r"prompt bad .*turn 2, .*'my text'.*RuntimeError: the board fell"
    with pytest.raises(UserError, match=expected):
        around(inner, Broken).generate(prompts, seed=1)
    assert [made.closed for made in Counting.made] == [1, 1]
    with pytest.raises(UserError, match=r"prompt p .*beginning: RuntimeError: no board"):
        around(inner, Broken).generate([asked(tokenizer, broken=0)], seed=1)


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (lambda step: "done", "rlhf.types.Step"),
        (lambda step: dataclasses.replace(step, reward=float("nan")), "nan"),
        (lambda step: dataclasses.replace(step, info={"board": "full"}), "board"),
    ],
)
def test_answers_that_are_none(tokenizer: Any, step: Any, named: str) -> None:
    class Wrong(Counting):
        def step(self, text: str) -> Any:
            return step(super().step(text))

    inner = Scripted(tokenizer, lambda name, turn: letters(tokenizer, "a"))
    with pytest.raises(UserError, match=rf"prompt p .*turn 1.*{named}"):
        around(inner, Wrong).generate([asked(tokenizer)], seed=1)


# ---- seeds ----


def test_environments_of_a_group_get_one_seed(tokenizer: Any) -> None:
    inner = Scripted(tokenizer, lambda name, turn: letters(tokenizer, "a"))
    generator = around(inner)
    generator.generate([asked(tokenizer, "p"), asked(tokenizer, "q")], n=2, seed=5)
    generator.generate([asked(tokenizer, "q")], seed=5, greedy=True)
    generator.generate([asked(tokenizer, "q")], seed=6)
    p, p_again, q, q_again, alone, other = [made.seed for made in Counting.made]
    assert p == p_again != q == q_again == alone != other
    assert inner.calls[3][2] and not inner.calls[0][2]
    assert 0 <= seed_of(2**62, "x") < 2**31


@pytest.fixture(scope="module")
def backends(tiny_model: Callable[..., Path]) -> Iterator[Callable[[str], Any]]:
    started: dict[str, Any] = {}

    def get(backend: str) -> Any:
        if backend not in started:
            cfg = config(backend)
            cfg = dataclasses.replace(cfg, environment=limits(max_tokens=34))
            started[backend] = make(cfg, tiny_model())
        return started[backend]

    yield get
    for generator in started.values():
        generator.close()


# random weights end a turn by chance alone: here one that was cut counts as ended
def episodes(inner: Any, directory: Path, prompts: list[Prompt], **asked: Any) -> list[Rollout]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    generator = EpisodeGenerator(
        Whole(inner, 6), tokenizer, limits(max_tokens=34), Counting, max_prompt=30, max_turn=6
    )
    return generator.generate(prompts, **asked)


def texts(directory: Path) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    words = ("the quick", "brown fox", "jumps", "over the lazy dog")
    return [
        Prompt(word, word, tuple(prompt_ids(tokenizer, word)), word, {"turns": 2 + i % 3})
        for i, word in enumerate(words)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_of_written_tokens(
    backend: str, backends: Callable[[str], Any], tiny_model: Callable[..., Path]
) -> None:
    """Sampled turn by turn, they are those of one pass over the whole episode."""
    import torch
    from transformers import AutoModelForCausalLM

    place, inner = tiny_model(), backends(backend)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).double()
    written = episodes(inner, place, texts(place), n=2, seed=4)
    assert any(len(rollout.turns) > 1 for rollout in written)
    for rollout in written:
        expected = forward_logprobs(model, rollout, inner.sampling)
        mask = rollout.written
        pairs = zip(rollout.rollout_logprobs, expected, mask, strict=True)
        assert max(abs(ours - theirs) for ours, theirs, own in pairs if own) < 1e-4
        observed = zip(rollout.rollout_logprobs, mask, strict=True)
        assert all(logprob == 0.0 for logprob, own in observed if not own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_other_episode_changes_what_is_drawn(
    backend: str, backends: Callable[[str], Any], tiny_model: Callable[..., Path]
) -> None:
    place, inner = tiny_model(), backends(backend)
    prompts = texts(place)
    together = episodes(inner, place, prompts, n=2, seed=9)
    assert len({tuple(rollout.token_ids) for rollout in together}) == len(together)
    for number, prompt in enumerate(prompts):
        alone = episodes(inner, place, [prompt], n=2, seed=9)
        theirs = together[2 * number : 2 * number + 2]
        assert [r.token_ids for r in alone] == [r.token_ids for r in theirs]
        for ours, shared in zip(alone, theirs, strict=True):
            assert worst(ours.rollout_logprobs, shared.rollout_logprobs) < 1e-5
    other = episodes(inner, place, prompts, n=2, seed=10)
    assert [r.token_ids for r in other] != [r.token_ids for r in together]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompts_own_limit(
    backend: str, backends: Callable[[str], Any], tiny_model: Callable[..., Path]
) -> None:
    place, inner = tiny_model(), backends(backend)
    prompts = texts(place)
    free = inner.generate(prompts, seed=2)
    limited = [
        dataclasses.replace(prompt, limit=limit)
        for prompt, limit in zip(prompts, (3, 1, None, 90), strict=True)
    ]
    for ours, theirs, prompt in zip(inner.generate(limited, seed=2), free, limited, strict=True):
        most = min(prompt.limit or 10, 10)
        assert ours.token_ids == theirs.token_ids[:most]
        assert worst(ours.rollout_logprobs, theirs.rollout_logprobs[:most]) < 1e-5
        cut = len(theirs.token_ids) > most
        assert ours.finish_reason == ("length" if cut else theirs.finish_reason)
    # a prompt may be as long as its own response leaves room for
    longest = dataclasses.replace(prompts[0], token_ids=(5,) * 63, limit=1)
    assert len(inner.generate([longest], seed=2)[0].token_ids) == 1
