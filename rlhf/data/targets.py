"""The formats that rows are written to: one pure function a target and kind, from canonical columns
(rlhf/data/prepare/items.py) to the target's row.

A row that a target can't hold raises RowError with the reason. What a target changes or leaves out
is noted. A target for conversations takes a text prompt as a user's message and a text answer as an
assistant's, with a note. The two answers of a pair stand in the order of its column `position`, or
in one drawn from their content, so that neither side is always first.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conf.choices import DataTarget
from rlhf.data.converting import both_sides, columns_of
from rlhf.data.formats import Use
from rlhf.data.formats.comparisons import ASSISTANT_TURN, HUMAN_TURN
from rlhf.data.prepare.items import CONTENT
from rlhf.data.rows import Chat, RowError
from rlhf.process.wording import describe
from rlhf.types import PreferencePair

Row = dict[str, Any]
_CANONICAL = (*CONTENT, "margin", "label")
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


@dataclass(slots=True)
class Draft:
    """One row to write: its canonical columns, its own others, and what has to be noted
    about it.
    """

    columns: Row
    own: Row
    notes: list[str]

    def take(self, name: str, otherwise: Any = None) -> Any:
        """An own column that the target has a place for; it is then no longer among the others."""
        value = self.own.pop(name, None)
        return otherwise if value is None else value

    def lose(self, name: str, why: str) -> None:
        """Note a column that the target can't hold."""
        if self.columns.get(name) is not None:
            self.notes.append(f"{name} is not carried: {why}")

    def margin(self) -> Row:
        return {} if self.columns.get("margin") is None else {"margin": self.columns["margin"]}


# ---- parts of rows ----


def _turns(draft: Draft, prompt: str | Chat) -> Chat:
    if isinstance(prompt, list):
        return prompt
    if not prompt:
        raise RowError(
            "key 'prompt': a conversation begins with what is asked, but this row's texts are whole"
        )
    draft.notes.append("texts become messages of a conversation")
    return [{"role": "user", "content": prompt}]


def _single(answer: str | Chat, key: str, *, empty: bool = False) -> str:
    """An answer's one text. Raises RowError for an answer of several messages, or without a
    text.
    """
    if isinstance(answer, list):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise RowError(
                f"key {key!r}: expected one message of the assistant's, found {len(answer)} "
                "messages"
            )
        answer = answer[0]["content"]
    if not answer and not empty:
        raise RowError(f"key {key!r}: expected text, found an empty one")
    return answer


def _plain(value: str | Chat, key: str, *, empty: bool = False) -> str:
    if isinstance(value, list):
        raise RowError(
            f"key {key!r}: expected text, found {describe(value)} messages, which this format "
            "has no place for"
        )
    if not value and not empty:
        raise RowError(f"key {key!r}: expected text, found an empty one")
    return value


def _sft_turns(draft: Draft) -> tuple[Chat, Chat]:
    """Context and answer of a row to train on; `answer` is empty where the whole conversation
    trains. Raises RowError for a whole text.
    """
    columns = draft.columns
    if "messages" in columns:
        return columns["messages"], []
    if "completion" not in columns:
        raise RowError("key 'text': a whole text has no turns, so it is no conversation")
    answer = columns["completion"]
    turns = _turns(draft, columns["prompt"])
    return turns, answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]


def _whole(draft: Draft) -> Chat:
    """A row to train on as one conversation."""
    context, answer = _sft_turns(draft)
    if answer:
        draft.notes.append(
            "prompt and completion become one conversation, whose assistant's turns all train"
        )
    return context + answer


def _from_value(chat: Chat) -> list[Row]:
    unknown = next((m["role"] for m in chat if m["role"] not in _SPEAKERS), None)
    if unknown is not None:
        raise RowError(f"role {unknown!r}: ShareGPT has {', '.join(_SPEAKERS.values())} only")
    return [{"from": _SPEAKERS[m["role"]], "value": m["content"]} for m in chat]


def _alpaca_context(chat: Chat) -> Row:
    """instruction, input, system and history of a conversation that ends with a user's message.
    Raises RowError for another order.
    """
    out: Row = {}
    turns = list(chat)
    if turns and turns[0]["role"] == "system" and turns[0]["content"]:
        out["system"] = turns.pop(0)["content"]
    roles = [m["role"] for m in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"] or not turns[-1]["content"]:
        raise RowError(
            "alpaca holds a system message, then turns of user and assistant, then an "
            f"instruction; found the roles {', '.join(roles)}"
        )
    history = [[turns[i]["content"], turns[i + 1]["content"]] for i in range(0, len(turns) - 1, 2)]
    return {
        "instruction": turns[-1]["content"],
        "input": "",
        **out,
        **({"history": history} if history else {}),
    }


def _position(draft: Draft, chosen: Any, rejected: Any) -> int:
    """1 or 2: where the chosen answer stands; as the row says, else by its content, so that neither
    side is preferred.
    """
    given = draft.own.pop("position", None)
    if given in (1, 2, "1", "2"):
        return int(given)
    digest = hashlib.sha256(
        json.dumps([draft.columns.get("prompt"), chosen, rejected], sort_keys=True).encode()
    )
    return 1 + digest.digest()[0] % 2


def _pair(draft: Draft) -> tuple[str, str, int]:
    """(first, second, where the chosen one stands) of a pair of single texts."""
    columns = draft.columns
    chosen, rejected = (
        _single(columns["chosen"], "chosen"),
        _single(columns["rejected"], "rejected"),
    )
    _same_kind(columns)
    position = _position(draft, chosen, rejected)
    return (chosen, rejected, 1) if position == 1 else (rejected, chosen, 2)


def _same_kind(columns: Row) -> None:
    """An answer is read in its prompt's form, so the two must have one."""
    if isinstance(columns["prompt"], list) != isinstance(columns["chosen"], list):
        raise RowError("key 'chosen': whole conversations without a prompt have no place here")


# ---- texts to train on ----


def _sft_messages(draft: Draft) -> list[Row]:
    return [{"messages": _whole(draft)}]


def _sft_sharegpt(draft: Draft) -> list[Row]:
    return [{"conversations": _from_value(_whole(draft))}]


def _sft_alpaca(draft: Draft) -> list[Row]:
    context, answer = _sft_turns(draft)
    if not answer:
        context, answer = context[:-1], context[-1:]
        draft.notes.append("of the conversation only the last answer trains")
    return [{**_alpaca_context(context), "output": _single(answer, "completion")}]


def _sft_alpaca_eval(draft: Draft) -> list[Row]:
    return [{**_sft_alpaca(draft)[0], "generator": draft.take("generator", "unknown")}]


def _same(draft: Draft) -> list[Row]:
    return [dict(draft.columns)]


def _table(draft: Draft) -> list[Row]:
    """Canonical columns as cells: texts, and true or false in words."""
    row = {
        key: _plain(value, key, empty=key == "prompt" and len(draft.columns) > 1)
        for key, value in draft.columns.items()
        if key in CONTENT
    }
    if "label" in draft.columns:
        row["label"] = "true" if draft.columns["label"] else "false"
    return [row]


# ---- pairs ----


def _pair_kto(draft: Draft) -> list[Row]:
    draft.lose("margin", "each answer is judged by itself")
    columns = draft.columns
    draft.notes.append("a pair becomes two judged answers")
    return [
        columns_of(answer, {})
        for answer in both_sides(
            PreferencePair(columns["prompt"], columns["chosen"], columns["rejected"])
        )
    ]


def _pair_messages(draft: Draft) -> list[Row]:
    columns = draft.columns
    turns = _turns(draft, columns["prompt"])
    chosen, rejected = (
        _single(columns["chosen"], "chosen", empty=True),
        _single(columns["rejected"], "rejected"),
    )
    return [
        {
            "messages": [*turns, {"role": "assistant", "content": chosen}],
            "rejected_response": rejected,
            **draft.margin(),
        }
    ]


def _pair_sharegpt(draft: Draft) -> list[Row]:
    columns = draft.columns
    turns = _from_value(_turns(draft, columns["prompt"]))
    sides = {
        side: {"from": "gpt", "value": _single(columns[side], side, empty=True)}
        for side in ("chosen", "rejected")
    }
    return [{"conversations": turns, **sides, **draft.margin()}]


def _pair_alpaca(draft: Draft) -> list[Row]:
    columns = draft.columns
    sides = {side: _single(columns[side], side) for side in ("chosen", "rejected")}
    return [{**_alpaca_context(_turns(draft, columns["prompt"])), **sides, **draft.margin()}]


def _pair_hh(draft: Draft) -> list[Row]:
    columns = draft.columns
    prompt = columns["prompt"]
    if not prompt:
        raise RowError(
            "key 'prompt': hh-rlhf wants a transcript before the answers, but this row's texts "
            "are whole"
        )
    chosen, rejected = (_single(columns[side], side, empty=True) for side in ("chosen", "rejected"))
    if any(ASSISTANT_TURN in text for text in (chosen, rejected)):
        raise RowError(f"an answer holds {ASSISTANT_TURN!r}, which begins a turn in hh-rlhf")
    if not isinstance(prompt, str) or not prompt.endswith(ASSISTANT_TURN):
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        marks = {"user": HUMAN_TURN, "assistant": ASSISTANT_TURN}
        unknown = next((m["role"] for m in turns if m["role"] not in marks), None)
        if unknown is not None:
            raise RowError(f"role {unknown!r}: hh-rlhf has Human: and Assistant: only")
        prompt = "".join(f"{marks[m['role']]} {m['content']}" for m in turns) + ASSISTANT_TURN
        chosen, rejected = f" {chosen}", f" {rejected}"
        draft.notes.append("prompt and answers become a transcript, read again as text")
    return [{"chosen": prompt + chosen, "rejected": prompt + rejected, **draft.margin()}]


def _pair_ultrafeedback(draft: Draft) -> list[Row]:
    columns = draft.columns
    turns = _turns(draft, columns["prompt"])
    # the reader takes the first user's message or the last message for the prompt
    prompt = next((m["content"] for m in turns if m["role"] == "user"), "") or turns[-1]["content"]
    if not prompt:
        raise RowError(
            "key 'prompt': expected text in the first user's or the last message, found none"
        )
    sides = {
        s: [*turns, {"role": "assistant", "content": _single(columns[s], s, empty=True)}]
        for s in ("chosen", "rejected")
    }
    prompt_id = draft.take("prompt_id", hashlib.sha256(prompt.encode()).hexdigest())
    return [{"prompt": prompt, "prompt_id": prompt_id, **sides, **draft.margin()}]


def _pair_shp(draft: Draft) -> list[Row]:
    prompt = _plain(draft.columns["prompt"], "prompt")
    first, second, position = _pair(draft)
    return [
        {
            "history": prompt,
            "human_ref_A": first,
            "human_ref_B": second,
            "labels": int(position == 1),
            **draft.margin(),
        }
    ]


def _asked(draft: Draft) -> str | Chat:
    prompt = draft.columns["prompt"]
    if not prompt:
        raise RowError("key 'prompt': expected text, found an empty one")
    return prompt


def _ranks(draft: Draft) -> tuple[Any, Any]:
    """Ranks of the chosen and the rejected answer: those that they had, or 1 and 2."""
    chosen, rejected = draft.take("rank_chosen"), draft.take("rank_rejected")
    numbers = all(
        isinstance(rank, (int, float)) and not isinstance(rank, bool) for rank in (chosen, rejected)
    )
    return (chosen, rejected) if numbers and chosen < rejected else (1, 2)


def _pair_nectar(draft: Draft) -> list[Row]:
    draft.lose("margin", "Nectar has ranks")
    prompt = _asked(draft)
    (first, second, position), (best, worst) = _pair(draft), _ranks(draft)
    ranks = (best, worst) if position == 1 else (worst, best)
    return [
        {
            "prompt": prompt,
            "answers": [
                {"answer": text, "rank": rank}
                for text, rank in zip((first, second), ranks, strict=True)
            ],
        }
    ]


def _pair_rewardbench(draft: Draft) -> list[Row]:
    columns, prompt = draft.columns, _asked(draft)
    _same_kind(columns)
    named = {
        name: draft.take(name, "unknown") for name in ("subset", "chosen_model", "rejected_model")
    }
    sides = {side: _single(columns[side], side) for side in ("chosen", "rejected")}
    return [{"prompt": prompt, **sides, **named, **draft.margin()}]


def _pair_alpaca_eval(draft: Draft) -> list[Row]:
    context = _alpaca_context(_turns(draft, draft.columns["prompt"]))
    first, second, position = _pair_of_turns(draft)
    margin = draft.columns.get("margin")
    if margin is None or not 0 < margin <= 1:
        draft.notes.append(
            "a margin outside (0, 1] becomes a preference of full strength, read again as 1"
        )
        margin = 1.0
    preference = 1.5 + margin / 2 * (1 if position == 2 else -1)
    if abs(preference - 1.5) * 2 != margin:
        draft.notes.append("the margin is rounded to the grades of preference")
    if preference == 1.5:
        raise RowError(f"key 'margin': {margin} is too small for a preference beside a tie")
    return [{**context, "output_1": first, "output_2": second, "preference": preference}]


def _pair_of_turns(draft: Draft) -> tuple[str, str, int]:
    columns = draft.columns
    chosen, rejected = (
        _single(columns["chosen"], "chosen"),
        _single(columns["rejected"], "rejected"),
    )
    position = _position(draft, chosen, rejected)
    return (chosen, rejected, 1) if position == 1 else (rejected, chosen, 2)


def _annotation(draft: Draft, result: Row) -> Row:
    who, seconds = draft.take("annotator"), draft.take("lead_time")
    out: Row = {"was_cancelled": False, "result": [{"id": "1", "origin": "manual", **result}]}
    if who is not None:
        out["completed_by"] = (
            int(who)
            if str(who).isascii() and str(who).isdigit() and str(int(who)) == str(who)
            else str(who)
        )
    return out | ({} if seconds is None else {"lead_time": seconds})


def _inside(draft: Draft, *taken: str) -> Row:
    """Own columns that go into an inner object, where they must not be mistaken for its parts."""
    for name in (*taken, *_CANONICAL):
        if draft.own.pop(name, None) is not None:
            draft.notes.append(f"{name} is not carried: the format has its own {name}")
    own, draft.own = draft.own, {}
    return own


def _pair_label_studio(draft: Draft) -> list[Row]:
    first, second, position = _pair(draft)
    result = {
        "from_name": "pw",
        "to_name": "pw",
        "type": "pairwise",
        "value": {"selected": "left" if position == 1 else "right"},
    }
    annotation = _annotation(draft, result)
    swapped = draft.take("swapped", position == 2)
    own = _inside(draft, "answer1", "answer2", "items")
    data = {
        **own,
        "prompt": draft.columns["prompt"],
        "answer1": first,
        "answer2": second,
        "swapped": swapped,
        **draft.margin(),
    }
    return [{"data": data, "annotations": [annotation]}]


def _pair_ranker(draft: Draft) -> list[Row]:
    draft.lose("margin", "a ranking has none")
    first, second, position = _pair(draft)
    if _ranks(draft) != (1, 2):
        draft.notes.append("ranks become 1 and 2")
    order = ["m1", "m2"] if position == 1 else ["m2", "m1"]
    annotation = _annotation(
        draft,
        {
            "from_name": "rank",
            "to_name": "results",
            "type": "ranker",
            "value": {"ranker": {"rank": order}},
        },
    )
    own = _inside(draft, "items")
    items = [
        {"id": name, "title": "", "body": text} for name, text in (("m1", first), ("m2", second))
    ]
    return [
        {
            "data": {**own, "prompt": draft.columns["prompt"], "items": items},
            "annotations": [annotation],
        }
    ]


def _pair_argilla(draft: Draft) -> list[Row]:
    draft.lose("margin", "a preference question has none")
    first, second, position = _pair(draft)
    who, record = draft.take("annotator"), draft.take("pair_id")
    if [one for one in ("rank_chosen", "rank_rejected") if draft.take(one) is not None]:
        draft.notes.append("ranks become a choice of one answer")
    response = {
        "value": f"response-{position - 1}",
        **({} if who is None else {"user_id": who}),
        "status": "submitted",
    }
    fields = {"prompt": draft.columns["prompt"], "response-0": first, "response-1": second}
    own = _inside(draft) | ({} if record is None else {"pair_id": record})
    given = {"metadata": own} if own else {}
    return [{"fields": fields, **given, "responses": {"preference": [response]}}]


def _pair_sheet(draft: Draft) -> list[Row]:
    prompt = _plain(draft.columns["prompt"], "prompt", empty=True)
    for side in ("chosen", "rejected"):
        _plain(draft.columns[side], side)
    first, second, position = _pair(draft)
    named = {name: draft.take(name, "") for name in ("annotator", "comment")}
    pair_id = draft.take(
        "pair_id",
        hashlib.sha256(json.dumps([prompt, *sorted((first, second))]).encode()).hexdigest()[:16],
    )
    preference = "a" if position == 1 else "b"
    margin = {key: repr(float(value)) for key, value in draft.margin().items()}
    return [
        {
            "pair_id": pair_id,
            "prompt": prompt,
            "response_a": first,
            "response_b": second,
            "preference": preference,
            **named,
            **margin,
        }
    ]


# ---- judged answers, prompts ----


def _judged_turns(draft: Draft) -> Chat:
    columns = draft.columns
    turns = _turns(draft, columns["prompt"])
    return [
        *turns,
        {"role": "assistant", "content": _single(columns["completion"], "completion", empty=True)},
    ]


def _unpaired_messages(draft: Draft) -> list[Row]:
    return [{"messages": _judged_turns(draft), "label": draft.columns["label"]}]


def _unpaired_sharegpt(draft: Draft) -> list[Row]:
    return [{"conversations": _from_value(_judged_turns(draft)), "kto_tag": draft.columns["label"]}]


def _unpaired_alpaca(draft: Draft) -> list[Row]:
    columns = draft.columns
    output = _single(columns["completion"], "completion")
    return [
        {
            **_alpaca_context(_turns(draft, columns["prompt"])),
            "output": output,
            "kto_tag": columns["label"],
        }
    ]


def _prompt_messages(draft: Draft) -> list[Row]:
    return [{"messages": _turns(draft, draft.columns["prompt"])}]


def _prompt_sharegpt(draft: Draft) -> list[Row]:
    return [{"conversations": _from_value(_turns(draft, draft.columns["prompt"]))}]


def _prompt_alpaca(draft: Draft) -> list[Row]:
    return [{**_alpaca_context(_turns(draft, draft.columns["prompt"])), "output": ""}]


_SHEET: dict[Use, Callable[[Draft], list[Row]]] = {
    Use.sft: _table,
    Use.preference: _pair_sheet,
    Use.unpaired: _table,
    Use.prompt: _table,
}
TARGETS: dict[DataTarget, dict[Use, Callable[[Draft], list[Row]]]] = {
    DataTarget.trl: dict.fromkeys(Use, _same),
    DataTarget.kto: {Use.unpaired: _same, Use.preference: _pair_kto},
    DataTarget.messages: {
        Use.sft: _sft_messages,
        Use.preference: _pair_messages,
        Use.unpaired: _unpaired_messages,
        Use.prompt: _prompt_messages,
    },
    DataTarget.sharegpt: {
        Use.sft: _sft_sharegpt,
        Use.preference: _pair_sharegpt,
        Use.unpaired: _unpaired_sharegpt,
        Use.prompt: _prompt_sharegpt,
    },
    DataTarget.alpaca: {
        Use.sft: _sft_alpaca,
        Use.preference: _pair_alpaca,
        Use.unpaired: _unpaired_alpaca,
        Use.prompt: _prompt_alpaca,
    },
    DataTarget.hh_rlhf: {Use.preference: _pair_hh},
    DataTarget.ultrafeedback: {Use.preference: _pair_ultrafeedback},
    DataTarget.shp: {Use.preference: _pair_shp},
    DataTarget.nectar: {Use.preference: _pair_nectar},
    DataTarget.rewardbench: {Use.preference: _pair_rewardbench},
    DataTarget.alpaca_eval: {Use.sft: _sft_alpaca_eval, Use.preference: _pair_alpaca_eval},
    DataTarget.label_studio: {Use.preference: _pair_label_studio},
    DataTarget.label_studio_ranker: {Use.preference: _pair_ranker},
    DataTarget.argilla: {Use.preference: _pair_argilla},
    DataTarget.csv: _SHEET,
    DataTarget.xlsx: _SHEET,
}
