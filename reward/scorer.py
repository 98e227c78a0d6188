"""Scores for responses: by a reward model, or by a function with TRL's reward signature. Every
failure names its prompt; nothing is scored 0.
"""

import asyncio
import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from conf.choices import Dtype
from conf.schema import RewardConfig
from reward.model import (
    Manifest,
    last_token_scores,
    load_reward_module,
    load_reward_tokenizer,
    template_hash,
    tokenizer_fingerprint,
)
from rlhf.models.encoding import is_chat, prompt_ids, response_ids
from rlhf.models.loading import resolve_dtype
from rlhf.types import NonFiniteScore, Rollout, Scorer, Scores, UserError

_SHOWN = 120  # characters of a prompt in an error


def name_prompt(rollout: Rollout) -> str:
    """How an error names a response's prompt."""
    text = rollout.prompt.text
    return f"prompt {rollout.prompt.id!r} ({text[:_SHOWN]!r}{' ...' if len(text) > _SHOWN else ''})"


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Row numbers by rising length, in batches of at most `budget` tokens padding included (a
    longer row comes alone).
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[row] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def score_ids(
    module: Any, rows: Sequence[Sequence[int]], budget: int, device: torch.device
) -> list[float]:
    """Scores of rows of token ids, in the rows' order, `budget` tokens at a time."""
    out = [math.nan] * len(rows)
    lengths = [len(row) for row in rows]
    for batch in token_batches(lengths, budget):
        # what fills the padding is never attended to
        input_ids = torch.zeros(len(batch), lengths[batch[-1]], dtype=torch.long)
        for line, i in enumerate(batch):
            input_ids[line, : lengths[i]] = torch.tensor(rows[i])
        sizes = torch.tensor([lengths[i] for i in batch], device=device)
        for i, score in zip(
            batch, last_token_scores(module, input_ids.to(device), sizes).tolist(), strict=True
        ):
            out[i] = score
    return out


def same_reading(manifest: Manifest, policy_tokenizer: Any) -> bool:
    """Whether the policy's tokens can go into the reward model as they are."""
    return tokenizer_fingerprint(policy_tokenizer) == manifest.tokenizer_hash


def check_tokenizers(
    path: str | Path,
    reward_tokenizer: Any,
    manifest: Manifest,
    policy_tokenizer: Any,
    key: str = "reward.path",
) -> None:
    """A reward model with another tokenizer than the policy's reads text, so it needs a template of
    its own. Raises UserError.
    """
    if not same_reading(manifest, policy_tokenizer) and reward_tokenizer.chat_template is None:
        raise UserError(
            f"{key}={path}: the reward model has another tokenizer than the policy and no chat "
            "template, so the policy's texts can't be put "
            "into its own format. Expected: a reward model trained from the policy (stage=reward "
            "model.path=<the policy's model directory>), or one "
            "with a template (stage=reward data.chat_template=<file>)."
        )


def text_ids(
    tokenizer: Any, manifest: Manifest, prompt: Any, response: str, *, finished: bool
) -> list[int]:
    """Token ids of a text that the reward model's own tokenizer reads, in the format that it was
    trained on.

    `prompt` is a string or, for a reward model of conversations only, messages; a string becomes
    the user's turn there.
    """
    if manifest.conversational and not is_chat(prompt):
        prompt = [{"role": "user", "content": prompt}]
    return prompt_ids(tokenizer, prompt) + response_ids(tokenizer, response, finished=finished)


class Stateless:
    """A scorer whose scores depend on nothing that came before."""

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Nothing to take over. Raises UserError when there is something: the checkpoint is of
        another reward.
        """
        if state:
            raise UserError(
                "The checkpoint holds statistics of the reward terms "
                f"{', '.join(sorted(state))}, but the reward has no such terms. "
                "Resume with the terms that the run started with."
            )


class RewardModelScorer(Stateless):
    """A reward model read at the last response token, in float32 at the head.

    With the policy's tokenizer and template the policy's token ids are scored as they are; with
    other ones the prompt's messages and the response's text are tokenised anew, in the format that
    the reward model was trained on.
    """

    def __init__(
        self,
        path: str,
        reward_cfg: RewardConfig,
        device: torch.device,
        *,
        policy_tokenizer: Any,
        dtype: torch.dtype | None = None,
        key: str = "reward.path",
    ) -> None:
        """Load the directory `path`, which the option `key` names in errors."""
        self.tokenizer, self.manifest = load_reward_tokenizer(path, key)
        check_tokenizers(path, self.tokenizer, self.manifest, policy_tokenizer, key)
        self.same_tokenizer = same_reading(self.manifest, policy_tokenizer)
        self.same_template = template_hash(policy_tokenizer) == self.manifest.chat_template_hash
        self.place = f"{key}={path}"
        self.budget = reward_cfg.batch_tokens
        self.device = device
        self.module: Any = load_reward_module(
            path, resolve_dtype(Dtype.auto) if dtype is None else dtype, key
        ).to(device)
        self.limit = int(
            getattr(self.module.config.get_text_config(), "max_position_embeddings", 2**31)
        )

    def token_ids(self, rollout: Rollout) -> list[int]:
        """What the reward model reads: prompt, response, and end-of-sequence where the policy ended
        its response.
        """
        prompt, source = rollout.prompt, rollout.prompt.source
        if self.same_tokenizer and (self.same_template or not is_chat(source)):
            return [*prompt.token_ids, *rollout.token_ids]
        text: Any = (
            prompt.text
            if source is None or (is_chat(source) and not self.manifest.conversational)
            else source
        )
        return text_ids(
            self.tokenizer,
            self.manifest,
            text,
            rollout.text,
            finished=rollout.finish_reason == "stop",
        )

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Raw scores, one term named reward_model. Raises UserError naming the prompt of a text
        that is too long or whose score is not finite.
        """
        rows = [self.token_ids(rollout) for rollout in rollouts]
        for rollout, row in zip(rollouts, rows, strict=True):
            if not 0 < len(row) <= self.limit:
                raise UserError(
                    f"{self.place}: {name_prompt(rollout)} with its response has {len(row)} "
                    f"tokens; expected 1 to {self.limit}."
                )
        scores = score_ids(self.module, rows, self.budget, self.device)
        for rollout, score in zip(rollouts, scores, strict=True):
            if not math.isfinite(score):
                raise NonFiniteScore(
                    f"{self.place}: the score of a response to {name_prompt(rollout)} is "
                    f"{score}, expected a finite number."
                )
        return Scores(total=scores, terms={"reward_model": list(scores)})


def load_function(spec: str, key: str = "reward.function") -> Callable[..., Any]:
    """The function that ``pkg.module:function`` names, `key` being the option that holds it. Raises
    UserError.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"{key}={spec}: expected pkg.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{key}={spec}: importing {module_name} failed: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")
        ]
        raise UserError(
            f"{key}={spec}: {module_name} has no function {name}. Its functions: "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    return function


class FunctionScorer(Stateless):
    """A Python function, plain or async, with TRL's reward signature: ``f(prompts, completions,
    completion_ids, **columns) -> list[float]``.

    Prompts are the rows' own (strings or messages); completions strings, or ``[{"role":
    "assistant", ...}]`` for messages; columns are the rows' other fields, None where a row lacks
    one. A function without ``**kwargs`` gets what it names.
    """

    def __init__(self, spec: str, key: str = "reward.function") -> None:
        self.place = f"{key}={spec}"
        self.function = load_function(spec, key)
        self.term = spec.partition(":")[2]

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """One term, named as the function. Raises UserError naming the prompt when the function
        raises or returns no finite number.
        """
        if not rollouts:
            return Scores(total=[], terms={self.term: []})
        try:
            values = self._call(rollouts)
        except UserError:
            raise
        except Exception as error:
            raise self._blame(rollouts, error) from error
        if not hasattr(values, "__len__") or len(values) != len(rollouts):
            found = (
                f"{len(values)} values"
                if hasattr(values, "__len__")
                else f"{type(values).__name__} {values!r}"
            )
            raise UserError(
                f"{self.place}: expected a list of {len(rollouts)} numbers, one per completion, "
                f"found {found}; "
                f"the first completion is to {name_prompt(rollouts[0])}."
            )
        total = [
            self._number(value, rollout) for value, rollout in zip(values, rollouts, strict=True)
        ]
        return Scores(total=total, terms={self.term: list(total)})

    def _call(self, rollouts: Sequence[Rollout]) -> Any:
        prompts = [r.prompt.text if r.prompt.source is None else r.prompt.source for r in rollouts]
        completions = [
            [{"role": "assistant", "content": r.text}] if is_chat(p) else r.text
            for p, r in zip(prompts, rollouts, strict=True)
        ]
        given: dict[str, Any] = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [list(r.token_ids) for r in rollouts],
        }
        for column in dict.fromkeys(key for r in rollouts for key in r.prompt.fields):
            given.setdefault(column, [r.prompt.fields.get(column) for r in rollouts])
        parameters = inspect.signature(self.function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            missing = [
                p.name
                for p in parameters
                if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in given
            ]
            if missing:
                raise UserError(
                    f"{self.place}: takes {', '.join(missing)}, which no row has. The rows give "
                    f"{', '.join(given)}."
                )
            given = {p.name: given[p.name] for p in parameters if p.name in given}
        result = self.function(**given)
        return asyncio.run(_await(result)) if inspect.isawaitable(result) else result

    def _blame(self, rollouts: Sequence[Rollout], error: Exception) -> UserError:
        """The error with the first prompt that fails by itself, or with the whole batch where none
        does.
        """
        culprit, found = (
            f"a batch of {len(rollouts)} responses, none of which fails by itself; the first is "
            f"to {name_prompt(rollouts[0])}",
            error,
        )
        for rollout in rollouts:
            try:
                self._call([rollout])
            except Exception as alone:  # noqa: BLE001 - it is reported, whatever it is
                culprit, found = name_prompt(rollout), alone
                break
        return UserError(f"{self.place} raised {type(found).__name__}: {found}; for {culprit}.")

    def _number(self, value: Any, rollout: Rollout) -> float:
        plain = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if isinstance(plain, numbers.Real) and math.isfinite(plain):
            return float(plain)
        raise NonFiniteScore(
            f"{self.place}: returned {value!r} for {name_prompt(rollout)}; expected a finite "
            "number."
        )


async def _await(result: Any) -> Any:
    return await result


def make_scorer(
    reward_cfg: RewardConfig, *, device: torch.device, policy_tokenizer: Any, training: bool = True
) -> Scorer:
    """The scorer that ``reward.path``, ``reward.function`` or ``reward.terms`` names. Raises
    UserError for none or several.

    With `training` false no term is normalised: its statistics would move from one call to the
    next, and scores have to be comparable.
    """
    check_source(reward_cfg)
    if reward_cfg.terms:
        from reward.terms import make_composite

        return make_composite(
            reward_cfg, device=device, policy_tokenizer=policy_tokenizer, training=training
        )
    if reward_cfg.function is not None:
        return FunctionScorer(reward_cfg.function)
    assert reward_cfg.path is not None
    return RewardModelScorer(reward_cfg.path, reward_cfg, device, policy_tokenizer=policy_tokenizer)


def check_source(reward_cfg: RewardConfig) -> None:
    """Scores come from one place. Raises UserError for none and for several."""
    given = {
        f"reward.path={reward_cfg.path}": reward_cfg.path is not None,
        f"reward.function={reward_cfg.function}": reward_cfg.function is not None,
        f"reward.terms ({', '.join(reward_cfg.terms)})": bool(reward_cfg.terms),
    }
    found = [place for place, is_set in given.items() if is_set]
    if not found:
        raise UserError(
            "reward.path, reward.function and reward.terms: expected one of them, found none. "
            "Set reward.path=<a reward run>/model, "
            "reward.function=pkg.module:function, or terms such as "
            "+reward.terms.accuracy.kind=numeric."
        )
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(found)}: expected one of them, found {len(found)}. Several sources "
            "become terms: "
            "reward.terms.<name>.kind=model with paths=[<directory>], kind=function with "
            "function=pkg.module:function."
        )
