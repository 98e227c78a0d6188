"""Which models a configuration's plan is about: the policy, what scores, and the judge of a
watch.
"""

import importlib
from dataclasses import replace

from conf.choices import ModelKind
from conf.schema import Config, ModelConfig
from conf.stages import OnlineStage
from rlhf.checks.memory.plan import Shapes
from rlhf.checks.memory.shapes import Shape, read_shape


def can_plan(cfg: Config) -> bool:
    """Whether the configuration says which model it is about."""
    return (
        cfg.model.path is not None
        or cfg.model.params is not None
        or cfg.model.kind is ModelKind.tiny
    )


def shapes_of(cfg: Config, *, assume_reward: bool) -> tuple[Shapes, list[str]]:
    """The models of a stage, and what had to be assumed. `assume_reward`: an online stage without
    any source of scores gets a reward model of the policy's size. Raises UserError for a model that
    can't be counted.
    """
    policy = read_shape(cfg.model)
    notes = [f"{policy.name}: {describe(policy)}"]
    stage = cfg.stage
    if not isinstance(stage, OnlineStage):
        return Shapes(policy), notes
    paths = importlib.import_module("reward.base").model_paths(cfg.reward)
    if stage.watch.judge_path is not None:
        paths = [*paths, ("stage.watch.judge_path", stage.watch.judge_path)]
    plain = ModelConfig(trust_remote_code=cfg.model.trust_remote_code)
    rewards = [(key, read_shape(replace(plain, path=path), key=key)) for key, path in paths]
    if not rewards and assume_reward and cfg.reward.function is None and not cfg.reward.terms:
        rewards = [("reward.path", policy)]
        notes.append(
            "a reward model of the policy's size is assumed; reward.path, reward.function or "
            "reward.terms say otherwise"
        )
    return Shapes(policy, tuple(rewards)), notes


def describe(shape: Shape) -> str:
    """A model in a few figures."""
    heads = (
        f"{shape.heads} heads"
        if shape.heads == shape.kv_heads
        else f"{shape.heads} heads, {shape.kv_heads} for keys"
    )
    return (
        f"{number(shape.parameters)} parameters, {shape.layers} layers of {shape.hidden} "
        f"({heads}; {shape.intermediate} inside), "
        f"{shape.vocab} tokens{' with tied embeddings' if shape.tied else ''}"
    )


def number(count: float) -> str:
    """8030261248 as 8.03B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"
