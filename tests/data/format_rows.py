"""Hypothesis strategies: a row of every format, and canonical rows of every kind, with text of any
script.
"""

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from rlhf.data.formats import Use

# Any character but halves of surrogate pairs, which no encoding holds; some scripts, joiners,
# separators and control characters more often.
_CHOSEN = (
    "\u00e9\u4f60\u597d\u0645\u0631\u062d\u0928\u092e\u1f60\U0001f600\U0001f468\u200d\u2028\u0085"
    "\ufeff\u200f\r\n\t "
    "\"',;=_x000D_\\{}[]<>\x00\x0b\x7f"
)
CHARACTERS = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(_CHOSEN))
TEXT = st.text(CHARACTERS, min_size=1, max_size=24)
ANY_TEXT = st.text(CHARACTERS, max_size=24)
NUMBER = st.floats(-1e6, 1e6, allow_nan=False) | st.integers(-1000, 1000)
Row = dict[str, Any]


def message(
    role: str, text: st.SearchStrategy[str] = ANY_TEXT
) -> st.SearchStrategy[dict[str, str]]:
    return text.map(lambda content: {"role": role, "content": content})


@st.composite
def questions(draw: st.DrawFn, last: st.SearchStrategy[str] = TEXT) -> list[dict[str, str]]:
    """system?, then (user, assistant)*, then user."""
    chat = [draw(message("system", TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        chat += [draw(message("user")), draw(message("assistant"))]
    return [*chat, draw(message("user", last))]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def tool() -> Row:
    """A function as OpenAI has it."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": "warmth", "parameters": parameters}}


OWN = st.fixed_dictionaries(
    {},
    optional={
        "source": ANY_TEXT,
        "weight": NUMBER,
        "tags": st.lists(ANY_TEXT, max_size=2),
        "annotator": TEXT,
        "position": st.sampled_from([1, 2]),
    },
)


@st.composite
def canonical(draw: st.DrawFn, kind: Use, chat: bool) -> Row:
    """A row of `kind` in canonical columns, of messages or of texts."""
    prompt: Any = draw(questions()) if chat else draw(TEXT)
    first, second = draw(st.lists(TEXT, min_size=2, max_size=2, unique=True))
    sides = (answer(first), answer(second)) if chat else (first, second)
    own = draw(OWN)
    if kind is Use.prompt:
        return {"prompt": prompt, **own}
    if kind is Use.sft:
        return {"prompt": prompt, "completion": sides[0], **own}
    if kind is Use.unpaired:
        return {"prompt": prompt, "completion": sides[0], "label": draw(st.booleans()), **own}
    margin = draw(st.none() | NUMBER.map(float))
    return {
        "prompt": prompt,
        "chosen": sides[0],
        "rejected": sides[1],
        **({} if margin is None else {"margin": margin}),
        **own,
    }


@dataclass
class Drawn:
    """What the rows of all formats are made of."""

    chat: list[dict[str, str]]
    prompt: str
    first: str
    second: str
    third: str
    plain: bool
    good: bool
    margin: float
    extra: str
    history: list[list[str]]
    ranks: list[int]

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [
            {
                "from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
                "value": m["content"],
            }
            for m in self.chat
        ]

    @property
    def alpaca(self) -> Row:
        return {
            "instruction": self.prompt,
            "input": self.extra,
            "system": self.extra,
            "history": self.history,
        }

    def whole(self, text: str) -> list[dict[str, str]]:
        return [*self.chat, *answer(text)]


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    texts = draw(st.lists(TEXT, min_size=3, max_size=3, unique=True))
    history = draw(st.lists(st.lists(ANY_TEXT, min_size=2, max_size=2), max_size=2))
    booleans = (draw(st.booleans()), draw(st.booleans()))
    return Drawn(
        draw(questions()),
        draw(TEXT),
        *texts,
        *booleans,
        draw(NUMBER),
        draw(ANY_TEXT),
        history,
        draw(st.permutations([1, 2, 3])),
    )


def training_rows(d: Drawn) -> dict[str, Row]:
    """TRL's columns and those of the tools that train."""
    said = {"from": "gpt", "value": d.first}
    sides = {"chosen": said, "rejected": {"from": "gpt", "value": d.second}}
    texts, chats = (
        {"chosen": d.first, "rejected": d.second},
        {"chosen": answer(d.first), "rejected": answer(d.second)},
    )
    return {
        "text": {"text": d.prompt},
        "prompt": {"prompt": d.prompt if d.plain else d.chat},
        "prompt_completion": {"prompt": d.prompt, "completion": d.first}
        if d.plain
        else {"prompt": d.chat, "completion": answer(d.first)},
        "messages": {"messages": d.whole(d.first)},
        "alpaca": {**d.alpaca, "output": d.first},
        "sharegpt": {"conversations": [*d.conversation, said]},
        "preference": {"prompt": d.prompt, **texts}
        if d.plain
        else {"prompt": d.chat, **chats, "margin": d.margin},
        "implicit_preference": {"chosen": d.prompt + d.first, "rejected": d.prompt + d.second}
        if d.plain
        else {"chosen": d.whole(d.first), "rejected": d.whole(d.second)},
        "alpaca_preference": {**d.alpaca, **texts},
        "sharegpt_preference": {"conversations": d.conversation, **sides},
        "swift_preference": {
            "messages": d.whole(d.first),
            "rejected_response": d.second,
            "margin": d.margin,
        },
        "rejected_messages": {
            "messages": d.whole(d.first),
            "rejected_messages": d.whole(d.second),
            "margin": d.margin,
        },
        "chosen_messages": {"messages": d.chat, "chosen_messages": answer(d.first)}
        | {"rejected_messages": answer(d.second)}
        if d.plain
        else {"chosen_messages": d.whole(d.first), "rejected_messages": d.whole(d.second)},
        "openai_preference": {
            "input": {"messages": d.chat, "tools": [tool()], "parallel_tool_calls": d.plain},
            "preferred_output": answer(d.first),
            "non_preferred_output": answer(d.second),
        },
        "xlam": {
            "id": 0,
            "query": d.prompt,
            "answers": json.dumps([{"name": "warmth", "arguments": {"city": d.first}}]),
            "tools": json.dumps([tool()["function"]]),
        },
        "unpaired": {"prompt": d.prompt, "completion": d.first, "label": d.good},
        "sharegpt_unpaired": {"conversations": [*d.conversation, said], "kto_tag": d.good},
        "messages_unpaired": {"messages": d.whole(d.first), "label": d.good},
        "alpaca_unpaired": {**d.alpaca, "output": d.first, "kto_tag": d.good},
    }


def published_rows(d: Drawn) -> dict[str, Row]:
    """Data sets of comparisons and of benchmarks."""
    transcript = f"\n\nHuman: {d.prompt}\n\nAssistant:"
    ranked = zip((d.first, d.second, d.third), d.ranks, strict=True)
    outputs = {
        "instruction": d.prompt,
        "output_1": d.first,
        "output_2": d.second,
        "generator_1": "g",
        "generator_2": "m",
        "annotator": "j",
    }
    winner = f"model_{1 + d.good}"
    return {
        "ultrafeedback": {
            "prompt": d.chat[-1]["content"],
            "prompt_id": "x",
            "chosen": d.whole(d.first),
            "rejected": d.whole(d.second),
            "score_chosen": d.margin,
            "score_rejected": 6.0,
        },
        "hh_rlhf": {"chosen": transcript + d.first, "rejected": transcript + d.second},
        "shp": {
            "post_id": "x",
            "history": d.prompt,
            "human_ref_A": d.first,
            "human_ref_B": d.second,
            "score_A": 9,
            "labels": int(d.good),
        },
        "nectar": {
            "prompt": d.prompt,
            "answers": [{"answer": text, "rank": rank, "model": "m"} for text, rank in ranked],
        },
        "alpaca_eval": {**d.alpaca, "output": d.first, "generator": "m", "dataset": "d"},
        "alpaca_eval_annotation": {**outputs, "preference": (0, 2, 1.8, 1.25)[d.ranks[0]]},
        "rewardbench": {
            "prompt": d.prompt,
            "chosen": d.first,
            "chosen_model": "c",
            "rejected": d.second,
            "rejected_model": "n",
            "subset": "s",
            "id": 1,
        },
        "mt_bench_answer": {
            "question_id": 81,
            "answer_id": "a",
            "model_id": "m",
            "choices": [{"index": 0, "turns": [d.first, d.second]}],
            "question_turns": [d.prompt, d.third],
        },
        "mt_bench_judgment": {
            "question_id": 81,
            "model_1": "m",
            "model_2": "n",
            "g1_winner": winner,
            "g2_winner": winner,
            "turn": 1,
            "question_turns": [d.prompt],
            "answer_turns_1": [d.first],
            "answer_turns_2": [d.second],
        },
    }


def question_rows(d: Drawn) -> dict[str, Row]:
    """Published data sets that differ in the names of their columns only."""
    asked: Row = {"system_prompt": d.extra, "question": d.prompt}
    reply = {"text": d.second, "role": "assistant", "rank": 1, "replies": []}
    return {
        "question": {"problem": d.prompt, "topic": "s"},
        "question_answer": {**asked, "response": d.first, "id": "x"},
        "question_judged": {"prompt": d.prompt, "response": d.first, "is_safe": d.good},
        "question_preference": {"system": d.extra, "query": d.prompt, "chosen": d.first}
        | {"rejected": d.second},
        "rated": {
            "instruction": d.prompt,
            "generations": [d.first, d.second],
            "ratings": [4.0, 2],
        },
        "summaries": {
            "info": {"post": d.prompt, "title": d.first, "subreddit": "s"},
            "summaries": [{"text": d.first}, {"text": d.second}],
            "choice": int(d.good),
            "worker": "w",
        },
        "dialogue": {"conversation": [{"input": d.prompt, "output": d.first}]},
        "message_tree": {
            "message_tree_id": "x",
            "prompt": {
                "text": d.prompt,
                "role": "prompter",
                "replies": [reply, {**reply, "text": d.first, "rank": 0}],
            },
        },
        "verifiable": {"prompt": d.chat, "reward_model": {"ground_truth": d.first}},
        "hh_rlhf_messages": {
            "chosen": f"\n\nHuman: q{d.prompt}?\n\nAssistant: a {d.good}",
            "rejected": f"\n\nHuman: q{d.prompt}?\n\nAssistant: r",
        },
    }


def tool_rows(d: Drawn) -> dict[str, Row]:
    """What annotation tools give back."""
    prompt = d.prompt if d.plain else d.chat
    pairwise = {
        "id": "x",
        "from_name": "pw",
        "to_name": "pw",
        "type": "pairwise",
        "value": {"selected": "left" if d.good else "right"},
    }
    ranking = {
        "from_name": "rank",
        "to_name": "results",
        "type": "ranker",
        "value": {"ranker": {"rank": [f"m{rank}" for rank in d.ranks]}},
    }
    items = [
        {"id": f"m{i}", "title": "", "body": text}
        for i, text in enumerate((d.first, d.second, d.third), start=1)
    ]
    return {
        "label_studio": {
            "id": 1,
            "data": {
                "prompt": prompt,
                "answer1": d.first,
                "answer2": d.second,
                "pair_id": "p",
                "swapped": d.plain,
            },
            "annotations": [
                {
                    "id": 9,
                    "completed_by": 7,
                    "was_cancelled": False,
                    "lead_time": 4.2,
                    "result": [pairwise],
                }
            ],
        },
        "label_studio_ranker": {
            "data": {"prompt": prompt, "items": items},
            "annotations": [{"result": [ranking]}],
        },
        "argilla": {
            "id": "1",
            "fields": {"prompt": prompt, "response-0": d.first, "response-1": d.second},
            "metadata": {"source": "s"},
            "suggestions": {"preference": {"value": "response-0", "score": 0.9, "agent": "rm"}},
            "responses": {"preference": [{"value": f"response-{int(d.good)}", "user_id": "u"}]},
        },
        "compared": {
            "id": 1,
            "prompt": d.prompt,
            "answer1": d.first,
            "answer2": d.second,
            "comparison": [{"selected": "left" if d.good else "right"}],
            "annotator": 3,
        },
        "arena": {
            "id": 7,
            "model_a": "m",
            "model_b": "n",
            "prompt": json.dumps([d.prompt]),
            "response_a": json.dumps([d.first], ensure_ascii=False),
            "response_b": [d.second],
            "winner_model_a": int(d.good),
            "winner_model_b": str(int(not d.good)),
            "winner_tie": 0,
        },
        "label_sheet": {
            "pair_id": "1",
            "prompt": d.prompt,
            "response_a": d.first,
            "response_b": d.second,
            "preference": ("", "a", "B", " b ")[d.ranks[0]],
            "annotator": "x",
            "comment": d.extra,
        },
    }


def format_row(name: str) -> st.SearchStrategy[Row]:
    """A row of the format `name` as its tool writes it."""
    return drawn().map(lambda d: all_rows(d)[name])


def all_rows(d: Drawn) -> dict[str, Row]:
    """A row of every format by its name."""
    return training_rows(d) | published_rows(d) | question_rows(d) | tool_rows(d)
