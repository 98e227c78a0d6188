"""What a step trains on: prompts are drawn, responses written and scored, and some selected.

What is drawn is a function of the number of draws since the run began (rlhf/online/ahead.py), so a
resumed run draws what an uninterrupted one would.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from conf.choices import Advantage, Selection
from conf.reward import TurnCredit
from conf.stages import OnlineStage
from policy.advantages import group_index, select, unequal_groups
from policy.batching import Batch, Pictures, collate, without_tokens
from policy.forward import Pair
from policy.prepare import TrainBatch
from reward.scorers.computed import band_score
from rlhf.models.templates import processor_of
from rlhf.online.ahead import Place, Writer
from rlhf.process import distributed
from rlhf.process.distributed import RunningMoments
from rlhf.types import Prompt, Rollout, Scores, UserError

LOG = logging.getLogger(__name__)
_PROVING = 8  # prompts
Phase = Callable[[str], AbstractContextManager[None]]  # rlhf.process.supervision.Clock.phase
Score = Callable[[list[Rollout]], Scores]


@dataclass(slots=True)
class Collected:
    """This rank's responses of one step. B in all, of which `rows` train."""

    rollouts: list[Rollout]  # every response of every draw
    scores: Scores  # of all of them, raw
    finals: torch.Tensor  # [B] after clipping, normalisation and penalties
    groups: list[int]  # [B]: responses to one row's prompt are compared with each other
    rows: list[int]  # those that train, in order
    pairs: list[Pair]  # of indices into `rows`: (better, worse)
    baselines: torch.Tensor | None  # [B] final scores of the greedy response to the same prompt
    draws: int  # how many draws of prompts it took
    clipped: float  # share of scores that stage.reward_clip cut
    seconds: float = 0.0  # that the generator took to write the responses


@dataclass(slots=True)
class Draw:
    """The responses to the prompts of one draw: b on this rank."""

    rollouts: list[Rollout]
    scores: Scores  # raw
    finals: torch.Tensor  # [b]
    clipped: float  # share of scores that stage.reward_clip cut


def final_scores(
    raw: Sequence[float],
    rollouts: Sequence[Rollout],
    stage: OnlineStage,
    limit: int,
    moments: RunningMoments,
    *,
    learn: bool = True,
) -> tuple[torch.Tensor, float]:
    """What the update sees [B], and the share of scores that were clipped: clip, then normalise,
    then the penalties for length.

    `limit`: the most tokens that the policy can write in a response. `learn` False leaves the
    running statistics as they are. Collective.
    """
    scores = torch.tensor(raw, dtype=torch.float32)
    clipped = 0.0
    if stage.reward_clip is not None:
        clipped = float((scores.abs() > stage.reward_clip).float().mean())
        scores = scores.clamp(-stage.reward_clip, stage.reward_clip)
    if stage.reward_normalise:
        if learn:
            moments.update(scores.tolist(), distributed.all_sum)
        scores = (scores - moments.mean) / max(moments.std, 1e-6)
    truncated = [r.truncated for r in rollouts]
    scores = scores - stage.truncation_penalty * torch.tensor(truncated, dtype=torch.float32)
    if stage.overlong_buffer:
        lengths = [r.length for r in rollouts]
        scores = scores - stage.overlong_penalty * overlong(lengths, limit, stage.overlong_buffer)
    return scores, clipped


def overlong(lengths: Sequence[int], limit: int, buffer: int) -> torch.Tensor:
    """Soft penalty for long responses, [B] in [0, 1]: 0 up to `limit` - `buffer` tokens, then
    rising to 1 at the limit.

    Yu et al. 2025, arXiv:2503.14476, equation 13, whose responses may run past `limit`; ours are
    cut there.
    """
    penalties = [-band_score(length, None, limit - buffer, buffer) for length in lengths]
    return torch.tensor(penalties, dtype=torch.float32)


@dataclass(slots=True)
class Collector:
    """Collects the responses of each step of a run."""

    writer: Writer
    stage: OnlineStage
    limit: int  # the most tokens that the policy can write in a response
    moments: RunningMoments  # of the scores of the whole run
    turn_weight: float = 0.0  # of the environment's rewards in the scores

    def collect(self, score: Score, place: Place, phase: Phase) -> Collected:
        """Draw prompts, write and score responses, and select what trains. Collective.

        With selection=unequal prompts are drawn again, at most `stage.resample` times, until all
        ranks together have `place.size` groups whose raw scores differ; what is above that is left
        out, and ranks may hold unequally many.
        """
        self.writer.begin()
        draws: list[Draw] = []
        selected: list[int] = []
        full = 0  # groups over all ranks whose scores differ
        while True:
            draw = self._draw(place.after(len(draws)), score, phase)
            start = sum(len(earlier.rollouts) for earlier in draws)
            draws.append(draw)
            if self.stage.selection is not Selection.unequal:
                break
            rows, added = self._unequal(draw, place.size - full)
            selected += [start + row for row in rows]
            full += added
            if len(draws) > self.stage.resample or full >= place.size:
                break
        collected = _joined(draws, [self._groups(draw) for draw in draws])
        if self.stage.selection is Selection.unequal:
            collected.rows = selected
        elif self.stage.selection is not Selection.all:
            _select(collected, self.stage.selection)
        if self.stage.advantage is Advantage.greedy:
            collected.baselines = self._greedy_baselines(collected, score, phase)
        collected.seconds = self.writer.spent()
        return collected

    def batch(self, collected: Collected, tokenizer: Any, version: int | None) -> TrainBatch:
        """`train_batch` of what this collected, as the stage's options say."""
        by_turns = self.stage.turn_credit is TurnCredit.turn
        return train_batch(
            collected,
            tokenizer.pad_token_id,
            mask_truncated=self.stage.mask_truncated,
            version=version,
            turn_weight=self.turn_weight if by_turns else None,
            processor=processor_of(tokenizer),
        )

    def _draw(self, place: Place, score: Score, phase: Phase) -> Draw:
        """The responses of the draw at `place`, scored."""
        stage = self.stage
        with phase("rollout"):
            written = self.writer.take(place)
        with phase("score"):
            scores = score(written)
            finals, clipped = final_scores(scores.total, written, stage, self.limit, self.moments)
        return Draw(written, scores, finals, clipped)

    def _unequal(self, draw: Draw, missing: int) -> tuple[list[int], int]:
        """Rows of this rank's groups whose raw scores differ, and how many such groups all ranks
        have. A group whose answers are all wrong stays out however its length penalties differ
        (Yu et al. 2025, arXiv:2503.14476, equation 11).

        Of all ranks' groups the first `missing` are taken, so that the number of ranks changes
        nothing. Collective.
        """
        groups = unequal_groups(draw.scores.total, self._groups(draw))
        counts = distributed.gather(len(groups))
        before = sum(counts[: distributed.rank()])
        own = max(0, min(len(groups), missing - before))
        return [row for rows in groups[:own] for row in rows], sum(counts)

    def _greedy_baselines(self, collected: Collected, score: Score, phase: Phase) -> torch.Tensor:
        """[B]: the final score of the most likely response to each rollout's prompt. Collective."""
        prompts: dict[int, Prompt] = {}  # of each group: one text may have several answers
        for group, rollout in zip(collected.groups, collected.rollouts, strict=True):
            prompts.setdefault(group, rollout.prompt)
        with phase("rollout"):
            greedy = self.writer.greedy(list(prompts.values()))
        with phase("score"):
            raw = score(greedy).total
            finals, _ = final_scores(raw, greedy, self.stage, self.limit, self.moments, learn=False)
        by_group = dict(zip(prompts, finals.tolist(), strict=True))
        baselines = [by_group[group] for group in collected.groups]
        return torch.tensor(baselines, dtype=torch.float32)

    def _groups(self, draw: Draw) -> list[int]:
        """[b]: which prompt of the draw each response answers. Two rows with one text are two
        prompts: their answers, and so their scores, differ.
        """
        return [row // self.stage.samples_per_prompt for row in range(len(draw.rollouts))]


def _joined(draws: Sequence[Draw], groups: Sequence[Sequence[int]]) -> Collected:
    """The responses of several draws, all of which train; `groups` of each draw's responses."""
    rollouts = [rollout for draw in draws for rollout in draw.rollouts]
    keys = [(i, group) for i, of_draw in enumerate(groups) for group in of_draw]
    return Collected(
        rollouts=rollouts,
        scores=_joined_scores([draw.scores for draw in draws]),
        finals=torch.cat([draw.finals for draw in draws]),
        groups=group_index(keys).tolist(),
        rows=list(range(len(rollouts))),
        pairs=[],
        baselines=None,
        draws=len(draws),
        clipped=sum(draw.clipped for draw in draws) / len(draws),
    )


def _joined_scores(parts: Sequence[Scores]) -> Scores:
    if len(parts) == 1:
        return parts[0]
    return Scores(
        total=[value for part in parts for value in part.total],
        terms=_joined_columns([part.terms for part in parts]),
        extras=_joined_columns([part.extras for part in parts]),
    )


def _joined_columns(parts: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """The values of several parts under each name of the first, one part after the other."""
    joined: dict[str, list[float]] = {}
    for name in parts[0]:
        joined[name] = [value for part in parts for value in part[name]]
    return joined


def _select(collected: Collected, selection: Selection) -> None:
    """Narrow `rows` to the selected ones, and name their pairs by indices into `rows`."""
    chosen = select(collected.finals.tolist(), collected.groups, selection)
    index = {row: i for i, row in enumerate(chosen.rows)}
    collected.rows = chosen.rows
    collected.pairs = [(index[better], index[worse]) for better, worse in chosen.pairs]


def train_batch(
    collected: Collected,
    pad_id: int,
    *,
    mask_truncated: bool,
    version: int | None = None,
    turn_weight: float | None = None,
    processor: Any = None,
) -> TrainBatch:
    """The rows that train as tensors on this rank's device. A rank without any holds one row that
    does not train, for the collectives that the others take part in.

    `mask_truncated`: responses that a limit ended do not train. `version`: of the weights
    that train, where some of them may be newer than what wrote the responses. `turn_weight`: what
    an environment's reward counts in a score, where each stands at the end of its turn.
    `processor`: of a picture model (rlhf.models.pictures), whose rows get their pictures. A
    response that holds the token of a picture does not train: the model would look for one more.
    """
    device = distributed.device()
    rows = collected.rows or [0]
    rollouts = [collected.rollouts[row] for row in rows]
    _check_beginnings(rollouts, [collected.groups[row] for row in rows])
    tokens, fit = tokens_of(rollouts, pad_id, processor)
    sampled = torch.zeros(tokens.response_mask.shape, dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        sampled[row, : len(rollout.rollout_logprobs)] = torch.tensor(rollout.rollout_logprobs)
    staleness = None
    if version is not None:
        staleness = _staleness(rollouts, version, tokens.response_mask).to(device)
    trains = bool(collected.rows)
    cut = [mask_truncated and r.truncated for r in rollouts]
    keep = [trains and fits and not short for fits, short in zip(fit, cut, strict=True)]
    return TrainBatch(
        tokens=tokens,
        keep=torch.tensor(keep, device=device),
        groups=group_index([collected.groups[row] for row in rows], device),
        pairs=collected.pairs,
        rollout_logprobs=sampled.to(device),
        staleness=staleness,
        turns=_turn_numbers(rollouts, tokens.response_mask),
        turn_rewards=_turn_rewards(rollouts, tokens.response_mask, turn_weight),
    )


def tokens_of(
    rollouts: Sequence[Rollout], pad_id: int, processor: Any = None
) -> tuple[Batch, list[bool]]:
    """Responses as rows on this rank's device, with their pictures where a `processor` reads some;
    and of each whether the model can read it as it was written.
    """
    shown = () if processor is None else processor.feature_ids
    responses, fit = without_tokens([r.token_ids for r in rollouts], shown, pad_id)
    if not all(fit):
        left = fit.count(False)
        LOG.warning("%d responses don't train: the policy wrote a picture's token in them.", left)
    prompts, written = [r.prompt.token_ids for r in rollouts], [r.written for r in rollouts]
    tokens = collate(prompts, responses, pad_id, distributed.device(), written)
    if processor is None:
        return tokens, fit
    from rlhf.models.pictures import picture_inputs

    rows = tuple(rollout.prompt.images for rollout in rollouts)
    pictures = Pictures(rows, functools.partial(picture_inputs, processor))
    return replace(tokens, pictures=pictures), fit


def refuse_mixed(prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """Several ranks take each pass together, through the part for pictures too: all prompts show
    some, or none does. Raises UserError.
    """
    if processor_of(tokenizer) is None or distributed.world_size() == 1:
        return
    if len({bool(prompt.images) for prompt in prompts}) > 1:
        raise UserError(
            "data.path: some prompts show pictures and some don't, which several ranks can't train "
            "on together. Train on one rank, or on one kind of prompts."
        )


def in_words(prompts: Sequence[Prompt], tokenizer: Any) -> Sequence[Prompt]:
    """Some of `prompts` without their pictures, for a picture model; all as they are for another.
    Syncs of weights are proved with texts.
    """
    processor = processor_of(tokenizer)
    if processor is None:
        return prompts
    out = []
    for prompt in prompts[:_PROVING]:
        ids = [token for token in prompt.token_ids if token not in processor.feature_ids]
        out.append(replace(prompt, token_ids=tuple(ids), images=()))
    return out


def _check_beginnings(rollouts: Sequence[Rollout], groups: Sequence[int]) -> None:
    """The episodes of a group begin alike: else they would not answer one prompt, which is read
    once for all of them, and their scores would not compare. Raises UserError.
    """
    first: dict[int, Prompt] = {}
    for rollout, group in zip(rollouts, groups, strict=True):
        prompt = first.setdefault(group, rollout.prompt)
        if prompt is not rollout.prompt and prompt.token_ids != rollout.prompt.token_ids:
            raise UserError(
                f"environment: reset() began two episodes of prompt {prompt.id} differently, with "
                "one row and one seed. Responses to a prompt are compared with each other: let "
                "what reset() returns depend on its row and its seed alone."
            )


def _turn_numbers(rollouts: Sequence[Rollout], mask: torch.Tensor) -> torch.Tensor | None:
    """The turn of each token under `mask`, [B, T] long on its device; None where no response has
    turns.
    """
    if not any(rollout.turns for rollout in rollouts):
        return None
    numbers = torch.zeros(mask.shape, dtype=torch.long)
    for row, rollout in enumerate(rollouts):
        for number, turn in enumerate(rollout.turns):
            numbers[row, turn.start : turn.end] = number
    return numbers.to(mask.device)


def _turn_rewards(
    rollouts: Sequence[Rollout], mask: torch.Tensor, weight: float | None
) -> torch.Tensor | None:
    """The environment's rewards times `weight` at the last token of their turns, [B, T] float32 on
    the device of `mask`; None without a weight.
    """
    if weight is None:
        return None
    rewards = torch.zeros(mask.shape, dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        for turn in rollout.turns:
            if turn.end > turn.start:
                rewards[row, turn.end - 1] = weight * turn.reward
    return rewards.to(mask.device)


def _staleness(rollouts: Sequence[Rollout], version: int, mask: torch.Tensor) -> torch.Tensor:
    """Versions that each token of the responses is behind `version`, [B, T] float32; 0 outside
    `mask`.
    """
    behind = torch.zeros(mask.shape, dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.token_ids)
        if rollout.versions is None:
            behind[row, :length] = float(version - rollout.version)
        else:
            behind[row, :length] = version - torch.tensor(rollout.versions, dtype=torch.float32)
    return torch.where(mask.to(behind.device), behind, 0.0)


def on_device(values: torch.Tensor | None, rows: Sequence[int]) -> torch.Tensor | None:
    """These rows of a [B] tensor, on this rank's device."""
    return None if values is None else values[list(rows)].to(distributed.device())
