"""The reward model behind the service: which requests it accepts, and how it scores them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conf.choices import Dtype
from reward.model import load_reward_model, score_ids, text_ids
from rlhf.models.encoding import is_chat
from rlhf.models.loading import resolve_dtype
from rlhf.types import UserError


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str


class Item(BaseModel):
    """One response to score. `token_ids`, prompt and response as sampled, is for clients whose
    tokenizer and template /info names.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | list[Message]
    response: str
    finished: bool = True
    fields: dict[str, Any] = Field(default_factory=dict)  # for verifiers; a reward model reads none
    token_ids: list[int] | None = None


class ScoreRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    items: list[Item]
    tokenizer_hash: str | None = None  # of the tokenizer that the items' token_ids come from


class Refused(Exception):
    """A request that gets an error: its status, what is wrong and with which item."""

    def __init__(self, status: int, message: str, item: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.item = status, message, item


def parse(body: bytes, max_batch: int, tokenizer_hash: str) -> list[Item]:
    """The items of a request to a reward model with the tokenizer `tokenizer_hash`. Raises Refused
    with the place of what is wrong.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        # of a value that fits none of two types, what is nearest to fitting
        first = max(found, key=lambda e: len(e["loc"]))
        if first["type"] == "json_invalid":
            raise Refused(400, f"the body is no JSON: {first['msg']}") from error
        place = [part for part in first["loc"] if part not in ("str", "list[Message]")]
        index = place[1] if len(place) > 1 and isinstance(place[1], int) else None
        name = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in place
        ).lstrip(".")
        raise Refused(422, f"{name or 'the body'}: {first['msg']}", index) from error
    items = request.items
    if len(items) > max_batch:
        raise Refused(
            422, f"items: found {len(items)}, expected at most {max_batch} (max_batch of /info)"
        )
    given = next((i for i, item in enumerate(items) if item.token_ids is not None), None)
    if given is not None and request.tokenizer_hash != tokenizer_hash:
        raise Refused(
            422,
            f"items[{given}].token_ids: of the tokenizer {request.tokenizer_hash}, expected "
            f"tokenizer_hash {tokenizer_hash} (of /info)",
            given,
        )
    return items


class ServedModel:
    """The reward model of a directory: token ids of items, and their scores."""

    def __init__(self, path: str, device: torch.device, *, batch_tokens: int) -> None:
        loaded = load_reward_model(path, resolve_dtype(Dtype.auto))
        self.path, self.device, self.budget = path, device, batch_tokens
        self.tokenizer, self.manifest = loaded.tokenizer, loaded.manifest
        module: Any = loaded.module
        self.module = module.to(device)
        config = self.module.config.get_text_config()
        self.limit = int(getattr(config, "max_position_embeddings", 2**31))
        self.vocabulary = int(config.vocab_size)

    def token_ids(self, items: Sequence[Item]) -> list[list[int]]:
        """What the model reads of each item. Raises Refused naming the item that it can't read."""
        rows = []
        for i, item in enumerate(items):
            row = (
                self._given(i, item.token_ids)
                if item.token_ids is not None
                else self._read(i, item)
            )
            if not 0 < len(row) <= self.limit:
                raise Refused(
                    422,
                    f"items[{i}]: prompt and response have {len(row)} tokens, expected 1 to "
                    f"{self.limit}",
                    i,
                )
            rows.append(row)
        return rows

    def _given(self, i: int, ids: list[int]) -> list[int]:
        wrong = next((t for t in ids if not 0 <= t < self.vocabulary), None)
        if wrong is not None:
            raise Refused(
                422,
                f"items[{i}].token_ids: found {wrong}, expected ids in [0, {self.vocabulary})",
                i,
            )
        return ids

    def _read(self, i: int, item: Item) -> list[int]:
        prompt = (
            item.prompt
            if isinstance(item.prompt, str)
            else [message.model_dump() for message in item.prompt]
        )
        if is_chat(prompt) and not self.manifest.conversational:
            raise Refused(
                422,
                f"items[{i}].prompt: found messages, but this reward model reads plain text: "
                "send the rendered prompt as a string",
                i,
            )
        try:
            return text_ids(
                self.tokenizer, self.manifest, prompt, item.response, finished=item.finished
            )
        except UserError as error:
            raise Refused(422, f"items[{i}].prompt: {error}", i) from error

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        return score_ids(self.module, rows, self.budget, self.device)

    def info(self) -> dict[str, Any]:
        """The manifest, and how much text an item may hold."""
        return {"model": self.path, **dataclasses.asdict(self.manifest), "max_tokens": self.limit}
