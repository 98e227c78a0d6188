"""Scores from a reward model or verifier behind HTTP. ``stage=serve_reward`` is such a server; any
other one that keeps the protocol will do.

    POST {url}/score   {"items": [{"prompt": <string or messages>, "response": "...",
                                   "finished": true, "fields": {...}}]}
                       answer: {"scores": [...], "model": "..."}, one finite number for each item,
                       in the order of the items
    GET  {url}/info    answer: the reward model's manifest (reward/model.py) with max_batch; a
                       server that doesn't have it answers 404
    GET  {url}/health  answer: 200 while the server lives

`finished` is false for a response that hit the length limit; `fields` holds the row's other
columns. Where /info names the tokenizer and the template of the policy, an item also carries
`token_ids`: prompt and response as they were sampled, because text that is tokenised again need not
give the same tokens. The request then carries their `tokenizer_hash`, which the server compares
with its own.

Failures that may pass (no connection, no answer in time, 429, 5xx) are retried after a growing
pause. Every other failure stops the run and names the prompt. Nothing is ever scored 0 instead.
"""

import asyncio
import json
import logging
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from conf.schema import RewardTerm
from reward.base import Stateless, name_prompt, refuse_turns
from reward.model import template_hash, tokenizer_fingerprint
from rlhf.models.encoding import is_chat
from rlhf.process.http import (
    all_pauses_s,
    bearer_token,
    checked_url,
    is_loopback,
    pause_s,
    retry_after_s,
)
from rlhf.types import NonFiniteScore, Rollout, Scores, UserError

LOG = logging.getLogger("reward.remote")
IN_FLIGHT = 4  # requests at the same time: enough to keep a server busy while it tokenises the next
_QUOTED = 300  # characters of a server's answer in an error


@dataclass(frozen=True, slots=True)
class Info:
    """What /info says of the server's reward model; None where it doesn't say it."""

    tokenizer_hash: str | None = None
    chat_template_hash: str | None = None
    conversational: bool | None = None
    max_batch: int | None = None  # the most items in a request


class RemoteScorer(Stateless):
    """Scores from a server, as one term called `name`.

    With `policy_tokenizer` the scorer compares tokenizers with the server, and sends token ids
    where they are the same: the reward model then gives the same scores over HTTP as in this
    process. Without it, texts are sent and nothing is compared.
    """

    def __init__(self, term: RewardTerm, name: str, *, policy_tokenizer: Any = None) -> None:
        key = f"reward.terms.{name}"
        self.term, self.name = term, name
        self.url = checked_url(term.url, f"{key}.url")
        self.token: str | None = None
        if term.token_env is not None:
            self.token = bearer_token(term.token_env, f"{key}.token_env")
        self._base = str(self.url).rstrip("/")
        self.where = f"{key} ({self._base})"
        self._hashes: tuple[str, str | None] | None = None  # of the policy's tokenizer, template
        if policy_tokenizer is not None:
            self._hashes = tokenizer_fingerprint(policy_tokenizer), template_hash(policy_tokenizer)
        self._info: Info | None = None  # asked for with the first responses
        self._model: str | None = None
        logging.getLogger("httpx").setLevel(logging.WARNING)  # or a line for each request
        if self.token is not None and self.url.scheme == "http" and not is_loopback(self.url.host):
            LOG.warning(
                "%s: the token travels unencrypted; use https unless the network between is "
                "trusted.",
                self.where,
            )

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Scores in the order of the rollouts. Raises UserError naming a prompt unless the server
        answers in time with a finite number for each response.
        """
        values: list[float] = []
        if rollouts:
            values = asyncio.run(self._score(rollouts))
        return Scores(total=values, terms={self.name: list(values)})

    async def _score(self, rollouts: Sequence[Rollout]) -> list[float]:
        headers = {"content-type": "application/json"}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        # No proxy for a loopback address, which it could not reach. No timeouts of httpx: they hold
        # for each read, ours for the whole answer.
        async with httpx.AsyncClient(
            headers=headers, timeout=None, trust_env=not is_loopback(self.url.host)
        ) as client:
            if self._info is None:
                self._info = await self._ask(client, rollouts[0])
            size = min(self.term.batch_size, self._info.max_batch or self.term.batch_size)
            batches = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
            deadline = self._deadline(math.ceil(len(batches) / IN_FLIGHT))
            free = asyncio.Semaphore(IN_FLIGHT)

            async def send(batch: Sequence[Rollout]) -> list[float]:
                async with free:
                    return await self._batch(client, batch, deadline)

            try:
                # the first failure cancels the other requests
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(send(batch)) for batch in batches]
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from failures.exceptions[0].__cause__
            return [value for task in tasks for value in task.result()]

    def _deadline(self, rounds: int) -> float:
        """The event loop's time after which no attempt starts.

        By then `rounds` requests, one after the other, could have used up all their retries and
        pauses.
        """
        retries = self.term.retries
        seconds_per_request = (retries + 1) * self.term.timeout_s + all_pauses_s(retries)
        return asyncio.get_running_loop().time() + rounds * seconds_per_request

    async def _ask(self, client: httpx.AsyncClient, first: Rollout) -> Info:
        """GET /info. Raises UserError when the server's reward model can't read the policy's texts,
        as a local reward model would.
        """
        blame = f"nothing was scored yet; the first response is to {name_prompt(first)}"
        answer = await self._send(client, "GET", "/info", None, blame, self._deadline(1))
        if answer.status_code in (404, 405):  # a server without /info, which the protocol allows
            return Info()
        content = self._json(self._accepted(answer, [first]), blame)
        types: dict[str, type] = {
            "tokenizer_hash": str,
            "chat_template_hash": str,
            "conversational": bool,
            "max_batch": int,
        }
        known = {
            key: content[key] for key, kind in types.items() if isinstance(content.get(key), kind)
        }
        info = Info(**known)
        if info.max_batch is not None and info.max_batch < 1:
            raise UserError(
                f"{self.where}: /info says max_batch={info.max_batch}, expected at least 1; "
                f"{blame}."
            )
        other = self._hashes is not None and info.tokenizer_hash not in (None, self._hashes[0])
        if other and info.chat_template_hash is None:
            raise UserError(
                f"{self.where}: the server's reward model has another tokenizer than the policy "
                "and no chat template, so the policy's texts can't be "
                "put into its own format. Expected: a reward model trained from the policy, or "
                "one with a template "
                "(stage=reward data.chat_template=<file>)."
            )
        return info

    def _item(self, rollout: Rollout) -> dict[str, Any]:
        """What the server gets of a response; it reads the same as RewardModelScorer.token_ids."""
        assert self._info is not None
        prompt = rollout.prompt
        text = prompt.text if prompt.source is None else prompt.source
        item: dict[str, Any] = {
            "response": rollout.text,
            "finished": not rollout.truncated,
            "fields": prompt.fields,
        }
        if self._info.conversational is False and is_chat(text):
            text = prompt.text  # a reward model of plain text reads the rendered conversation
        item["prompt"] = text
        if prompt.tools and is_chat(text):
            item["tools"] = prompt.tools
        same_template = (
            self._hashes is not None and self._hashes[1] == self._info.chat_template_hash
        )
        if (
            self._hashes is not None
            and self._hashes[0] == self._info.tokenizer_hash
            and (same_template or not is_chat(prompt.source))
        ):
            item["token_ids"] = [*prompt.token_ids, *rollout.token_ids]
        else:
            refuse_turns(rollout, self.where)
        return item

    def _body(self, batch: Sequence[Rollout]) -> bytes:
        items = []
        for rollout in batch:
            try:
                items.append(json.dumps(self._item(rollout), allow_nan=False))
            except (TypeError, ValueError) as error:
                columns = ", ".join(rollout.prompt.fields) or "none"
                raise UserError(
                    f"{self.where}: the row of {name_prompt(rollout)} can't be sent as JSON: "
                    f"{error}. Its columns beside the prompt: {columns}."
                ) from error
        # The server may have been restarted with another reward model, to which the ids mean other
        # tokens: the hash lets it refuse them.
        tokenizer = ""
        if self._hashes is not None:
            tokenizer = f', "tokenizer_hash": {json.dumps(self._hashes[0])}'
        return f'{{"items": [{", ".join(items)}]{tokenizer}}}'.encode()

    async def _batch(
        self, client: httpx.AsyncClient, batch: Sequence[Rollout], deadline: float
    ) -> list[float]:
        blame = f"in a batch of {len(batch)} responses; the first is to {name_prompt(batch[0])}"
        answer = self._accepted(
            await self._send(client, "POST", "/score", self._body(batch), blame, deadline), batch
        )
        content = self._json(answer, blame)
        scores = content.get("scores")
        if not isinstance(scores, list) or len(scores) != len(batch):
            answered = self._quote(repr(scores))
            if isinstance(scores, list):
                answered = f"{len(scores)} values"
            raise UserError(
                f"{self.where}: expected scores, a list of {len(batch)} numbers, one per "
                f"response, found {answered}; {blame}."
            )
        for value, rollout in zip(scores, batch, strict=True):
            if (
                isinstance(value, bool)
                or not isinstance(value, numbers.Real)
                or not math.isfinite(value)
            ):
                raise NonFiniteScore(
                    f"{self.where}: returned {self._quote(repr(value))} for "
                    f"{name_prompt(rollout)}; expected a finite number."
                )
        self._compare_model(content.get("model"))
        return [float(value) for value in scores]

    def _compare_model(self, model: object) -> None:
        """Warn when the server scores with another reward model than before: its scores have
        another scale.
        """
        if isinstance(model, str) and model != self._model:
            if self._model is not None:
                LOG.warning(
                    "%s: the server now scores with %s, before with %s.",
                    self.where,
                    self._quote(model),
                    self._quote(self._model),
                )
            self._model = model

    async def _send(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: bytes | None,
        blame: str,
        deadline: float,
    ) -> httpx.Response:
        """The final answer to a request, good or bad. Failures that may pass are retried; raises
        UserError when they don't pass.
        """
        loop = asyncio.get_running_loop()
        for attempt in range(self.term.retries + 1):
            pause = pause_s(attempt)
            try:
                async with asyncio.timeout(self.term.timeout_s):
                    answer = await client.request(method, self._base + path, content=body)
            except TimeoutError:
                problem = f"no answer within timeout_s={self.term.timeout_s:g} s"
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {self._quote(str(error))}"
            except httpx.RequestError as error:
                raise UserError(
                    f"{self.where}: the answer can't be read: {type(error).__name__}: "
                    f"{self._quote(str(error))}; {blame}."
                ) from error
            else:
                if (
                    answer.status_code != httpx.codes.TOO_MANY_REQUESTS
                    and not answer.is_server_error
                ):
                    return answer
                problem = f"HTTP {answer.status_code} {self._quote(answer.text)}"
                pause = max(pause, retry_after_s(answer))
            tried = f"attempt {attempt + 1} of {self.term.retries + 1}"
            if attempt == self.term.retries:
                break
            if loop.time() + pause >= deadline:
                problem += (
                    f", and {pause:.3g} s to wait before the next attempt would pass the "
                    "limit of the whole call"
                )
                break
            LOG.warning("%s: %s (%s); again in %.3g s.", self.where, problem, tried, pause)
            await asyncio.sleep(pause)
        raise UserError(
            f"{self.where}: {path} failed: {problem} ({tried}); {blame}. Is the server up? "
            "Otherwise raise timeout_s or retries."
        )

    def _accepted(self, answer: httpx.Response, batch: Sequence[Rollout]) -> httpx.Response:
        """A 2xx answer as it is. Raises UserError for any other, with the prompt of the item that
        the server names, or else of the first in the batch.
        """
        if answer.is_success:
            return answer
        token = "Does the environment variable that token_env names hold the server's token?"
        hints = {
            401: token,
            403: token,
            404: f"Is there a server of the protocol at this url ({self._base}/score)?",
            413: "Lower batch_size.",
        }
        hint = hints.get(
            answer.status_code, "The server refuses this request, so it was not repeated."
        )
        rollout, text = batch[0], answer.text
        try:
            error = json.loads(text)["error"]
            text = str(error["message"])
            if isinstance(error.get("item"), int) and 0 <= error["item"] < len(batch):
                rollout = batch[error["item"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # not our server's form: its text is quoted as it is
        raise UserError(
            f"{self.where}: HTTP {answer.status_code} {self._quote(text)} for "
            f"{name_prompt(rollout)}. {hint}"
        )

    def _json(self, answer: httpx.Response, blame: str) -> dict[str, Any]:
        try:
            content = json.loads(answer.content)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.where}: the answer is not JSON: {self._quote(answer.text)}; {blame}."
            ) from error
        if not isinstance(content, dict):
            raise UserError(
                f"{self.where}: expected a JSON object, found {self._quote(answer.text)}; {blame}."
            )
        return content

    def _quote(self, text: str) -> str:
        """The beginning of a server's text, on one line, without our token."""
        if self.token:
            text = text.replace(self.token, "***")
        line = " ".join(text.split())
        if len(line) <= _QUOTED:
            return line
        return line[:_QUOTED] + " ..."
