"""The formats that rows are written to: one pure function a target and kind, from canonical columns (rlhf/data/prepare/items.py) to the target's row.

A row that a target can't hold raises RowError with the reason. What a target changes or leaves out is noted. A target for conversations takes a text
prompt as a user's message and a text answer as an assistant's, with a note. The two answers of a pair stand in the order of its column `position`,
or in one drawn from their content, so that neither side is always first.
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
from rlhf.data.rows import Chat, RowError, describe
from rlhf.types import PreferencePair

Row = dict[str, Any]
_CANONICAL = (*CONTENT, "margin", "label")
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


@dataclass(slots=True)
class Source:
    """One row to write: its canonical columns, its own others, and what has to be noted about it."""

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


def _turns(source: Source, prompt: str | Chat) -> Chat:
    if isinstance(prompt, list):
        return prompt
    if not prompt:
        raise RowError("key 'prompt': a conversation begins with what is asked, but this row's texts are whole")
    source.notes.append("texts become messages of a conversation")
    return [{"role": "user", "content": prompt}]


def _single(answer: str | Chat, key: str, *, empty: bool = False) -> str:
    """An answer's one text. Raises RowError for an answer of several messages, or without a text."""
    if isinstance(answer, list):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise RowError(f"key {key!r}: expected one message of the assistant's, found {len(answer)} messages")
        answer = answer[0]["content"]
    if not answer and not empty:
        raise RowError(f"key {key!r}: expected text, found an empty one")
    return answer


def _plain(value: str | Chat, key: str, *, empty: bool = False) -> str:
    if isinstance(value, list):
        raise RowError(f"key {key!r}: expected text, found {describe(value)} messages, which this format has no place for")
    if not value and not empty:
        raise RowError(f"key {key!r}: expected text, found an empty one")
    return value


def _sft_turns(source: Source) -> tuple[Chat, Chat]:
    """Context and answer of a row to train on; `answer` is empty where the whole conversation trains. Raises RowError for a whole text."""
    columns = source.columns
    if "messages" in columns:
        return columns["messages"], []
    if "completion" not in columns:
        raise RowError("key 'text': a whole text has no turns, so it is no conversation")
    answer = columns["completion"]
    turns = _turns(source, columns["prompt"])
    return turns, answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]


def _whole(source: Source) -> Chat:
    """A row to train on as one conversation."""
    context, answer = _sft_turns(source)
    if answer:
        source.notes.append("prompt and completion become one conversation, whose assistant's turns all train")
    return context + answer


def _from_value(chat: Chat) -> list[Row]:
    unknown = next((m["role"] for m in chat if m["role"] not in _SPEAKERS), None)
    if unknown is not None:
        raise RowError(f"role {unknown!r}: ShareGPT has {', '.join(_SPEAKERS.values())} only")
    return [{"from": _SPEAKERS[m["role"]], "value": m["content"]} for m in chat]


def _alpaca_context(chat: Chat) -> Row:
    """instruction, input, system and history of a conversation that ends with a user's message. Raises RowError for another order."""
    out: Row = {}
    turns = list(chat)
    if turns and turns[0]["role"] == "system" and turns[0]["content"]:
        out["system"] = turns.pop(0)["content"]
    roles = [m["role"] for m in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"] or not turns[-1]["content"]:
        raise RowError(f"alpaca holds a system message, then turns of user and assistant, then an instruction; found the roles {', '.join(roles)}")
    history = [[turns[i]["content"], turns[i + 1]["content"]] for i in range(0, len(turns) - 1, 2)]
    return {"instruction": turns[-1]["content"], "input": "", **out, **({"history": history} if history else {})}


def _position(source: Source, chosen: Any, rejected: Any) -> int:
    """1 or 2: where the chosen answer stands; as the row says, else by its content, so that neither side is preferred."""
    given = source.own.pop("position", None)
    if given in (1, 2, "1", "2"):
        return int(given)
    digest = hashlib.sha256(json.dumps([source.columns.get("prompt"), chosen, rejected], sort_keys=True).encode())
    return 1 + digest.digest()[0] % 2


def _pair(source: Source) -> tuple[str, str, int]:
    """(first, second, where the chosen one stands) of a pair of single texts."""
    columns = source.columns
    chosen, rejected = _single(columns["chosen"], "chosen"), _single(columns["rejected"], "rejected")
    _same_kind(columns)
    position = _position(source, chosen, rejected)
    return (chosen, rejected, 1) if position == 1 else (rejected, chosen, 2)


def _same_kind(columns: Row) -> None:
    """An answer is read in its prompt's form, so the two must have one."""
    if isinstance(columns["prompt"], list) != isinstance(columns["chosen"], list):
        raise RowError("key 'chosen': whole conversations without a prompt have no place here")


# ---- texts to train on ----


def _sft_messages(source: Source) -> list[Row]:
    return [{"messages": _whole(source)}]


def _sft_sharegpt(source: Source) -> list[Row]:
    return [{"conversations": _from_value(_whole(source))}]


def _sft_alpaca(source: Source) -> list[Row]:
    context, answer = _sft_turns(source)
    if not answer:
        context, answer = context[:-1], context[-1:]
        source.notes.append("of the conversation only the last answer trains")
    return [{**_alpaca_context(context), "output": _single(answer, "completion")}]


def _sft_alpaca_eval(source: Source) -> list[Row]:
    return [{**_sft_alpaca(source)[0], "generator": source.take("generator", "unknown")}]


def _same(source: Source) -> list[Row]:
    return [dict(source.columns)]


def _table(source: Source) -> list[Row]:
    """Canonical columns as cells: texts, and true or false in words."""
    row = {key: _plain(value, key, empty=key == "prompt" and len(source.columns) > 1) for key, value in source.columns.items() if key in CONTENT}
    if "label" in source.columns:
        row["label"] = "true" if source.columns["label"] else "false"
    return [row]


# ---- pairs ----


def _pair_kto(source: Source) -> list[Row]:
    source.lose("margin", "each answer is judged by itself")
    columns = source.columns
    source.notes.append("a pair becomes two judged answers")
    return [columns_of(answer, {}) for answer in both_sides(PreferencePair(columns["prompt"], columns["chosen"], columns["rejected"]))]


def _pair_messages(source: Source) -> list[Row]:
    columns = source.columns
    turns = _turns(source, columns["prompt"])
    chosen, rejected = _single(columns["chosen"], "chosen", empty=True), _single(columns["rejected"], "rejected")
    return [{"messages": [*turns, {"role": "assistant", "content": chosen}], "rejected_response": rejected, **source.margin()}]


def _pair_sharegpt(source: Source) -> list[Row]:
    columns = source.columns
    turns = _from_value(_turns(source, columns["prompt"]))
    sides = {side: {"from": "gpt", "value": _single(columns[side], side, empty=True)} for side in ("chosen", "rejected")}
    return [{"conversations": turns, **sides, **source.margin()}]


def _pair_alpaca(source: Source) -> list[Row]:
    columns = source.columns
    sides = {side: _single(columns[side], side) for side in ("chosen", "rejected")}
    return [{**_alpaca_context(_turns(source, columns["prompt"])), **sides, **source.margin()}]


def _pair_hh(source: Source) -> list[Row]:
    columns = source.columns
    prompt = columns["prompt"]
    if not prompt:
        raise RowError("key 'prompt': hh-rlhf wants a transcript before the answers, but this row's texts are whole")
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
        source.notes.append("prompt and answers become a transcript, read again as text")
    return [{"chosen": prompt + chosen, "rejected": prompt + rejected, **source.margin()}]


def _pair_ultrafeedback(source: Source) -> list[Row]:
    columns = source.columns
    turns = _turns(source, columns["prompt"])
    prompt = next((m["content"] for m in turns if m["role"] == "user"), turns[-1]["content"])
    if not prompt:
        raise RowError("key 'prompt': expected text in the first user's message, found an empty one")
    sides = {s: [*turns, {"role": "assistant", "content": _single(columns[s], s, empty=True)}] for s in ("chosen", "rejected")}
    prompt_id = source.take("prompt_id", hashlib.sha256(prompt.encode()).hexdigest())
    return [{"prompt": prompt, "prompt_id": prompt_id, **sides, **source.margin()}]


def _pair_shp(source: Source) -> list[Row]:
    prompt = _plain(source.columns["prompt"], "prompt")
    first, second, position = _pair(source)
    return [{"history": prompt, "human_ref_A": first, "human_ref_B": second, "labels": int(position == 1), **source.margin()}]


def _asked(source: Source) -> str | Chat:
    prompt = source.columns["prompt"]
    if not prompt:
        raise RowError("key 'prompt': expected text, found an empty one")
    return prompt


def _ranks(source: Source) -> tuple[Any, Any]:
    """Ranks of the chosen and the rejected answer: those that they had, or 1 and 2."""
    chosen, rejected = source.take("rank_chosen"), source.take("rank_rejected")
    numbers = all(isinstance(rank, (int, float)) and not isinstance(rank, bool) for rank in (chosen, rejected))
    return (chosen, rejected) if numbers and chosen < rejected else (1, 2)


def _pair_nectar(source: Source) -> list[Row]:
    source.lose("margin", "Nectar has ranks")
    prompt = _asked(source)
    (first, second, position), (best, worst) = _pair(source), _ranks(source)
    ranks = (best, worst) if position == 1 else (worst, best)
    return [{"prompt": prompt, "answers": [{"answer": text, "rank": rank} for text, rank in zip((first, second), ranks, strict=True)]}]


def _pair_rewardbench(source: Source) -> list[Row]:
    columns, prompt = source.columns, _asked(source)
    _same_kind(columns)
    named = {name: source.take(name, "unknown") for name in ("subset", "chosen_model", "rejected_model")}
    sides = {side: _single(columns[side], side) for side in ("chosen", "rejected")}
    return [{"prompt": prompt, **sides, **named, **source.margin()}]


def _pair_alpaca_eval(source: Source) -> list[Row]:
    context = _alpaca_context(_turns(source, source.columns["prompt"]))
    first, second, position = _pair_of_turns(source)
    margin = source.columns.get("margin")
    if margin is None or not 0 < margin <= 1:
        source.notes.append("a margin outside (0, 1] becomes a preference of full strength, read again as 1")
        margin = 1.0
    preference = 1.5 + margin / 2 * (1 if position == 2 else -1)
    if abs(preference - 1.5) * 2 != margin:
        source.notes.append("the margin is rounded to the grades of preference")
    if preference == 1.5:
        raise RowError(f"key 'margin': {margin} is too small for a preference beside a tie")
    return [{**context, "output_1": first, "output_2": second, "preference": preference}]


def _pair_of_turns(source: Source) -> tuple[str, str, int]:
    columns = source.columns
    chosen, rejected = _single(columns["chosen"], "chosen"), _single(columns["rejected"], "rejected")
    position = _position(source, chosen, rejected)
    return (chosen, rejected, 1) if position == 1 else (rejected, chosen, 2)


def _annotation(source: Source, result: Row) -> Row:
    who, seconds = source.take("annotator"), source.take("lead_time")
    out: Row = {"was_cancelled": False, "result": [{"id": "1", "origin": "manual", **result}]}
    if who is not None:
        out["completed_by"] = int(who) if str(who).isascii() and str(who).isdigit() and str(int(who)) == str(who) else str(who)
    return out | ({} if seconds is None else {"lead_time": seconds})


def _inside(source: Source, *taken: str) -> Row:
    """Own columns that go into an inner object, where they must not be mistaken for its parts."""
    for name in (*taken, *_CANONICAL):
        if source.own.pop(name, None) is not None:
            source.notes.append(f"{name} is not carried: the format has its own {name}")
    own, source.own = source.own, {}
    return own


def _pair_label_studio(source: Source) -> list[Row]:
    first, second, position = _pair(source)
    result = {"from_name": "pw", "to_name": "pw", "type": "pairwise", "value": {"selected": "left" if position == 1 else "right"}}
    annotation = _annotation(source, result)
    swapped = source.take("swapped", position == 2)
    own = _inside(source, "answer1", "answer2", "items")
    data = {**own, "prompt": source.columns["prompt"], "answer1": first, "answer2": second, "swapped": swapped, **source.margin()}
    return [{"data": data, "annotations": [annotation]}]


def _pair_ranker(source: Source) -> list[Row]:
    source.lose("margin", "a ranking has none")
    first, second, position = _pair(source)
    if _ranks(source) != (1, 2):
        source.notes.append("ranks become 1 and 2")
    order = ["m1", "m2"] if position == 1 else ["m2", "m1"]
    annotation = _annotation(source, {"from_name": "rank", "to_name": "results", "type": "ranker", "value": {"ranker": {"rank": order}}})
    own = _inside(source, "items")
    items = [{"id": name, "title": "", "body": text} for name, text in (("m1", first), ("m2", second))]
    return [{"data": {**own, "prompt": source.columns["prompt"], "items": items}, "annotations": [annotation]}]


def _pair_argilla(source: Source) -> list[Row]:
    source.lose("margin", "a preference question has none")
    first, second, position = _pair(source)
    who, record = source.take("annotator"), source.take("pair_id")
    if [one for one in ("rank_chosen", "rank_rejected") if source.take(one) is not None]:
        source.notes.append("ranks become a choice of one answer")
    response = {"value": f"response-{position - 1}", **({} if who is None else {"user_id": who}), "status": "submitted"}
    fields = {"prompt": source.columns["prompt"], "response-0": first, "response-1": second}
    own = _inside(source) | ({} if record is None else {"pair_id": record})
    given = {"metadata": own} if own else {}
    return [{"fields": fields, **given, "responses": {"preference": [response]}}]


def _pair_sheet(source: Source) -> list[Row]:
    prompt = _plain(source.columns["prompt"], "prompt", empty=True)
    for side in ("chosen", "rejected"):
        _plain(source.columns[side], side)
    first, second, position = _pair(source)
    named = {name: source.take(name, "") for name in ("annotator", "comment")}
    pair_id = source.take("pair_id", hashlib.sha256(json.dumps([prompt, *sorted((first, second))]).encode()).hexdigest()[:16])
    preference = "a" if position == 1 else "b"
    margin = {key: repr(float(value)) for key, value in source.margin().items()}
    return [{"pair_id": pair_id, "prompt": prompt, "response_a": first, "response_b": second, "preference": preference, **named, **margin}]


# ---- judged answers, prompts ----


def _judged_turns(source: Source) -> Chat:
    columns = source.columns
    turns = _turns(source, columns["prompt"])
    return [*turns, {"role": "assistant", "content": _single(columns["completion"], "completion", empty=True)}]


def _unpaired_messages(source: Source) -> list[Row]:
    return [{"messages": _judged_turns(source), "label": source.columns["label"]}]


def _unpaired_sharegpt(source: Source) -> list[Row]:
    return [{"conversations": _from_value(_judged_turns(source)), "kto_tag": source.columns["label"]}]


def _unpaired_alpaca(source: Source) -> list[Row]:
    columns = source.columns
    output = _single(columns["completion"], "completion")
    return [{**_alpaca_context(_turns(source, columns["prompt"])), "output": output, "kto_tag": columns["label"]}]


def _prompt_messages(source: Source) -> list[Row]:
    return [{"messages": _turns(source, source.columns["prompt"])}]


def _prompt_sharegpt(source: Source) -> list[Row]:
    return [{"conversations": _from_value(_turns(source, source.columns["prompt"]))}]


def _prompt_alpaca(source: Source) -> list[Row]:
    return [{**_alpaca_context(_turns(source, source.columns["prompt"])), "output": ""}]


_SHEET = {Use.sft: _table, Use.preference: _pair_sheet, Use.unpaired: _table, Use.prompt: _table}
TARGETS: dict[DataTarget, dict[Use, Callable[[Source], list[Row]]]] = {
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
    DataTarget.alpaca: {Use.sft: _sft_alpaca, Use.preference: _pair_alpaca, Use.unpaired: _unpaired_alpaca, Use.prompt: _prompt_alpaca},
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
