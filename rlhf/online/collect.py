"""What a step trains on: prompts become responses, responses scores, and a selection of them goes
on. One function of the step's draws.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from conf.choices import Advantage, Selection
from conf.stages import OnlineStage
from policy.advantages import group_index
from policy.selection import all_equal, rows_by_group, select, unequal_groups
from reward.scorers.length import band_score
from rlhf.process import distributed
from rlhf.process.moments import RunningMoments
from rlhf.types import Generator, Prompt, Rollout, Scores

Phase = Callable[[str], AbstractContextManager[None]]  # a clock's phase by name


@dataclass(slots=True)
class Collected:
    """This rank's responses of one step. B in all, of which `rows` train."""

    rollouts: list[Rollout]  # every response of every draw
    scores: Scores  # of all of them, raw
    finals: torch.Tensor  # [B] after clipping, normalisation and penalties
    groups: list[int]  # [B]: responses to one prompt in one draw are compared with each other
    rows: list[int]  # those that train, in order
    pairs: list[tuple[int, int]]  # of places in `rows`: (better, worse)
    baselines: torch.Tensor | None  # [B] final scores of the greedy response to the same prompt
    draws: int  # how many draws of prompts it took
    clipped: float  # share of scores that stage.reward_clip cut


def step_prompts(prompts: Sequence[Prompt], step: int, per_step: int, seed: int) -> list[Prompt]:
    """This rank's prompts of draw `step` (from 0): consecutive slices of one shuffled pass after
    another, a function of the draw alone.
    """
    chosen = []
    orders: dict[int, torch.Tensor] = {}
    for index in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(index, len(prompts))
        if epoch not in orders:
            orders[epoch] = torch.randperm(
                len(prompts), generator=torch.Generator().manual_seed(seed * 100_003 + epoch)
            )
        chosen.append(prompts[int(orders[epoch][place])])
    share = per_step // distributed.world_size()
    return chosen[distributed.rank() * share : (distributed.rank() + 1) * share]


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

    `limit`: the most tokens that a response can have. `learn` False leaves the running statistics
    as they are. Collective.
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
    scores = scores - stage.truncation_penalty * torch.tensor(
        [r.finish_reason == "length" for r in rollouts], dtype=torch.float32
    )
    if stage.overlong_buffer:
        scores = scores - stage.overlong_penalty * overlong(
            [len(r.token_ids) for r in rollouts], limit, stage.overlong_buffer
        )
    return scores, clipped


def overlong(lengths: Sequence[int], limit: int, buffer: int) -> torch.Tensor:
    """Soft penalty for long responses, [B] in [0, 1]: 0 up to `limit` - `buffer` tokens, then
    rising to 1 at the limit.

    Yu et al. 2025, arXiv:2503.14476, equation 13, whose responses may run past `limit`; ours are
    cut there.
    """
    return torch.tensor(
        [-band_score(length, None, limit - buffer, buffer) for length in lengths],
        dtype=torch.float32,
    )


def collect(
    generator: Generator,
    score: Callable[[list[Rollout]], Scores],
    prompts: Sequence[Prompt],
    stage: OnlineStage,
    *,
    first_draw: int,
    seed: int,
    limit: int,
    moments: RunningMoments,
    phase: Phase,
) -> Collected:
    """Draw prompts, write and score responses, and select what trains.

    With selection=unequal prompts are drawn again, at most `stage.resample` times, until all ranks
    together have `stage.prompts_per_step` groups whose scores differ; what is above that is left
    out, and ranks may hold unequally many. `first_draw` counts the draws of prompts since the run
    began, so a resumed run draws on where it stopped. Collective.
    """
    rollouts: list[Rollout] = []
    keys: list[tuple[int, str]] = []
    parts: list[Scores] = []
    finals: list[torch.Tensor] = []
    clipped: list[float] = []
    selected: list[int] = []
    draws = full = 0  # draws of prompts; groups found over all ranks
    while True:
        with phase("rollout"):
            drawn = step_prompts(prompts, first_draw + draws, stage.prompts_per_step, seed)
            written = generator.generate(
                drawn, n=stage.samples_per_prompt, seed=seed * 1_000_003 + first_draw + draws
            )
        draws += 1
        with phase("score"):
            scored = score(written)
            final, share = final_scores(scored.total, written, stage, limit, moments)
        start = len(rollouts)
        rollouts += written
        keys += [(draws, rollout.prompt.id) for rollout in written]
        parts.append(scored)
        finals.append(final)
        clipped.append(share)
        if stage.selection is not Selection.unequal:
            break
        groups = unequal_groups(
            final.tolist(), group_index([rollout.prompt.id for rollout in written]).tolist()
        )
        counts = distributed.gather(len(groups))
        # the first groups of all ranks' are kept, so that the number of ranks changes nothing
        room = stage.prompts_per_step - full
        mine = max(0, min(len(groups), room - sum(counts[: distributed.rank()])))
        selected += [start + row for rows in groups[:mine] for row in rows]
        full += sum(counts)
        if draws > stage.resample or full >= stage.prompts_per_step:
            break
    numbers = group_index(keys).tolist()
    everything = Collected(
        rollouts=rollouts,
        scores=_joined(parts),
        finals=torch.cat(finals),
        groups=numbers,
        rows=list(range(len(rollouts))),
        pairs=[],
        baselines=None,
        draws=draws,
        clipped=sum(clipped) / len(clipped),
    )
    if stage.selection is Selection.unequal:
        everything.rows = selected
    elif stage.selection is not Selection.all:
        chosen = select(everything.finals.tolist(), numbers, stage.selection)
        place = {row: i for i, row in enumerate(chosen.rows)}
        everything.rows = chosen.rows
        everything.pairs = [(place[a], place[b]) for a, b in chosen.pairs]
    if stage.advantage is Advantage.greedy:
        everything.baselines = _greedy_baselines(
            generator, score, rollouts, stage, limit, moments, phase
        )
    return everything


def _joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several draws as one."""
    if len(parts) == 1:
        return parts[0]
    return Scores(
        total=[value for part in parts for value in part.total],
        terms={
            name: [value for part in parts for value in part.terms[name]] for name in parts[0].terms
        },
        extras={
            name: [value for part in parts for value in part.extras[name]]
            for name in parts[0].extras
        },
    )


def _greedy_baselines(
    generator: Generator,
    score: Callable[[list[Rollout]], Scores],
    rollouts: Sequence[Rollout],
    stage: OnlineStage,
    limit: int,
    moments: RunningMoments,
    phase: Phase,
) -> torch.Tensor:
    """[B]: the final score of the most likely response to each rollout's prompt."""
    prompts = list({rollout.prompt.id: rollout.prompt for rollout in rollouts}.values())
    with phase("rollout"):
        greedy = generator.generate(prompts, n=1, seed=0, greedy=True)
    with phase("score"):
        finals, _ = final_scores(score(greedy).total, greedy, stage, limit, moments, learn=False)
    by_prompt = {
        rollout.prompt.id: float(final) for rollout, final in zip(greedy, finals, strict=True)
    }
    return torch.tensor([by_prompt[rollout.prompt.id] for rollout in rollouts], dtype=torch.float32)


def group_figures(collected: Collected) -> dict[str, float]:
    """Sums over this rank: groups, groups whose scores are all equal, and the size of the largest
    and (negated) smallest group for a maximum.
    """
    scores = collected.finals.tolist()
    members = rows_by_group(collected.groups)
    equal = sum(all_equal(scores, rows) for rows in members)
    sizes = [len(rows) for rows in members]
    return {
        "groups": float(len(members)),
        "equal": float(equal),
        "largest": float(max(sizes)),
        "smallest": -float(min(sizes)),
    }
