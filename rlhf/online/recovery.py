"""What an online run needs to go on: a step that must not be applied, the batch that caused it, and
the state that a checkpoint holds.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from conf.stages import OnlineStage
from policy.engines import resharding
from policy.engines.base import Brake, GradientNoise, Plateau
from policy.model import load_tending, save_tending
from policy.prepare import TrainBatch
from rlhf.online.judging import Watching
from rlhf.online.setup import Parts
from rlhf.process import distributed, randomness
from rlhf.process.distributed import RunningMoments
from rlhf.run.directory import write_tensors
from rlhf.types import Rollout, TrainingDiverged

LOG = logging.getLogger("rlhf.online.recovery")
_STATE = "loop.json"
_REFERENCE = "reference.pt"


class BadStep(TrainingDiverged):
    """A step that must not be applied, on every rank alike; what follows is stage.on_nonfinite's.
    `scores`: a score is no number.
    """

    def __init__(self, message: str, *, scores: bool = False) -> None:
        super().__init__(message)
        self.scores = scores


@dataclass(slots=True)
class RunState:
    """What a run knows of itself beside weights and random generators."""

    brake: Brake
    first_size: int  # prompts of the run's first step, over all ranks
    plateau: Plateau | None = None  # with scheduler=plateau
    noise: GradientNoise | None = None  # of the policy's gradients
    moments: RunningMoments = field(default_factory=RunningMoments)  # of the scores
    step: int = 0  # updates done
    draws: int = 0  # of prompts, since the run began
    prompts: int = 0  # that these draws took, over all ranks
    rewinds: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of each step

    def draw(self, draws: int, size: int) -> None:
        """Count draws of `size` prompts, over all ranks."""
        self.draws += draws
        self.prompts += draws * size

    def look_for_plateau(self, metrics: Mapping[str, float]) -> None:
        """scheduler=plateau: show it the step's score; a step that was left out has none."""
        plateau = self.plateau
        if plateau is None or "objective/scores" not in metrics:
            return
        if plateau.look(metrics["objective/scores"]) and distributed.is_main():
            LOG.info(
                "step %d: the score stalls, the learning rate is %.3g of the highest now "
                "(stage.plateau).",
                self.step,
                plateau.scale,
            )


def noise_of(parts: Parts, stage: OnlineStage) -> GradientNoise | None:
    """What looks at the policy's gradients, with stage.noise_scale."""
    if stage.noise_scale is None:
        return None
    noise = GradientNoise(parts.models.policy.rates.params, stage.noise_scale)
    noise.watch()
    return noise


def write_bad_batch(
    directory: Path,
    rollouts: Sequence[Rollout],
    scores: Sequence[float] | None = None,
    batch: TrainBatch | None = None,
) -> None:
    """Write this rank's responses of a step into ``rollouts.jsonl``, and where it came to an update
    its tensors into ``batch.safetensors``. `scores`: raw, one per response. The turns of episodes
    say which of their tokens the policy wrote.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "rollouts.jsonl").open("w", encoding="utf-8") as file:
        for i, rollout in enumerate(rollouts):
            row: dict[str, object] = {
                "prompt": rollout.prompt.text,
                "response": rollout.text,
                "token_ids": rollout.token_ids,
                "rollout_logprobs": rollout.rollout_logprobs,
                "finish_reason": rollout.finish_reason,
                "score": None if scores is None else scores[i],
            }
            if rollout.prompt.images:
                row["images"] = [picture["path"] for picture in rollout.prompt.images]
            if rollout.turns:
                turns = [asdict(turn) for turn in rollout.turns]
                row |= {"success": rollout.success, "turns": turns}
            file.write(json.dumps(row) + "\n")
    if batch is not None:
        write_tensors(directory / "batch.safetensors", batch.tensors())


def write_state(directory: Path, state: RunState, parts: Parts, watching: Watching) -> None:
    """Write everything that a resumed run needs into a checkpoint's directory. A collective."""
    models = parts.models
    for name, engine in _engines(parts).items():
        engine.save(directory / name)
        save_tending(engine.module.model, directory / name)
    randomness.save(directory)
    if not distributed.is_main():
        return
    content = {
        "step": state.step,
        "draws": state.draws,
        "prompts": state.prompts,
        "kl": parts.kl.state_dict(),
        "moments": state.moments.state_dict(),
        "brake": state.brake.state_dict(),
        "rewinds": state.rewinds,
        "noise": None if state.noise is None else state.noise.state_dict(),
        "plateau": None if state.plateau is None else state.plateau.state_dict(),
        "scorer": parts.scorer.state_dict(),
        "history": state.history,
        "watching": watching.state_dict(),
    }
    if parts.moving_reference:
        torch.save(models.reference.model.state_dict(), directory / _REFERENCE)
    resharding.record(directory, parts.engine)
    (directory / _STATE).write_text(json.dumps(content), encoding="utf-8")


def _engines(parts: Parts) -> dict[str, Any]:
    """Those whose state a checkpoint holds, by the name of its folder."""
    engines: dict[str, Any] = {"policy": parts.models.policy}
    if parts.models.critic is not None:
        engines["critic"] = parts.models.critic
    return engines


def read_state(directory: Path, state: RunState, parts: Parts, watching: Watching) -> None:
    """Take over what `write_state` wrote into a checkpoint, all but the random generators. More
    rewinds than it counts stay counted. A collective.
    """
    content = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    models = parts.models
    for name, engine in _engines(parts).items():
        engine.load(directory / name)
        load_tending(engine.module.model, directory / name)
    if parts.moving_reference:
        weights = torch.load(directory / _REFERENCE, weights_only=True, map_location="cpu")
        models.reference.model.load_state_dict(weights)
    parts.scorer.load_state_dict(content["scorer"])
    parts.kl.load_state_dict(content["kl"])
    watching.load_state_dict(content["watching"])
    state.step, state.draws = content["step"], content["draws"]
    # a checkpoint from before steps could grow
    state.prompts = content.get("prompts", state.draws * state.first_size)
    state.brake.load_state_dict(content["brake"])
    if state.plateau is not None and content.get("plateau") is not None:
        state.plateau.load_state_dict(content["plateau"])
    if state.noise is not None and content.get("noise") is not None:
        state.noise.load_state_dict(content["noise"])
    state.rewinds = max(state.rewinds, content["rewinds"])
    state.history = content["history"]
    state.moments.load_state_dict(content["moments"])
