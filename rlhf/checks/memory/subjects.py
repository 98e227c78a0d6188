"""Which models a configuration's plan is about: the policy, what scores, and the judge of a
watch.
"""

from collections.abc import Sequence
from dataclasses import replace

from conf.choices import ModelKind
from conf.schema import Config, ModelConfig
from rlhf.checks.memory.plan import Shapes
from rlhf.checks.memory.shapes import Shape, read_shape


def can_plan(cfg: Config) -> bool:
    """Whether the configuration says which model it is about."""
    return (
        cfg.model.path is not None
        or cfg.model.params is not None
        or cfg.model.kind is ModelKind.tiny
    )


def shapes_of(model: ModelConfig, scoring: Sequence[tuple[str, str]]) -> tuple[Shapes, list[str]]:
    """The shapes of the policy and of the reward models beside it (option and directory of each),
    and a note that describes the policy. Raises UserError for a model that can't be counted.
    """
    policy = read_shape(model)
    plain = ModelConfig(trust_remote_code=model.trust_remote_code)
    rewards = [(key, read_shape(replace(plain, path=path), key=key)) for key, path in scoring]
    return Shapes(policy, tuple(rewards)), [f"{policy.name}: {describe(policy)}"]


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
