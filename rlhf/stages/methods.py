"""The step before every stage that loads models: what stages choose by a name in the configuration
is made known. These are the ways to train beside a frozen model (policy/adapters/), their ways into
vLLM's engine and vLLM's servers (rollout/), optimizers and how models are parted while they are
read (policy/engines/), how ranks share rows and how packed ones attend (rlhf/offline/,
policy/shared_engine.py), the verifiers of answers (reward/verifiers/), the scorer of episodes and
the environments that policies act in (rlhf/environments/). The only importer of their files.
"""

from typing import Any

import rollout
from conf.choices import AdapterKind, Carrier, RolloutBackend, TermKind
from conf.reward import EnvironmentConfig, EnvironmentKind
from conf.schema import EngineConfig
from policy import adapters
from policy.adapters import (
    adalora,
    bottleneck,
    gelora,
    lora,
    lora_mini,
    molora,
    prompts,
    quantized,
    rasa,
    scaled,
)
from policy.engines import base, loading, optimizers, parts
from reward import terms
from reward.scorers.environment import EnvironmentScorer
from reward.verifiers.evaluated import Code, Gym, MathAnswer
from reward.verifiers.instructions import Instructions
from reward.verifiers.text import Choice, Exact, Format, JsonSchema, Numeric, Regex
from rlhf.environments import factory
from rollout import episodes
from rollout.embeds import EmbedsGenerator
from rollout.modules import ModulesGenerator, check_places
from rollout.server.checks import check_servers
from rollout.server.generator import ServerGenerator

ALL = {
    AdapterKind.lora: lora.METHOD,
    AdapterKind.adalora: adalora.METHOD,
    AdapterKind.gelora: gelora.METHOD,
    AdapterKind.lora_mini: lora_mini.METHOD,
    AdapterKind.rasa: rasa.METHOD,
    AdapterKind.bottleneck: bottleneck.METHOD,
    AdapterKind.molora: molora.METHOD,
    AdapterKind.vera: scaled.VERA,
    AdapterKind.ia3: scaled.IA3,
    AdapterKind.oft: scaled.OFT,
    **prompts.METHODS,
}
VERIFIERS: dict[TermKind, Any] = {
    TermKind.exact: Exact,
    TermKind.numeric: Numeric,
    TermKind.choice: Choice,
    TermKind.regex: Regex,
    TermKind.format: Format,
    TermKind.json_schema: JsonSchema,
    TermKind.math: MathAnswer,
    TermKind.instructions: Instructions,
    TermKind.code: Code,
    TermKind.gym: Gym,
}


def _sharing_sft(model: Any, engine: EngineConfig) -> type[Any]:
    """The trainer of ranks that share rows, which imports TRL."""
    from rlhf.offline.shared_rows import sharing_sft

    return sharing_sft(model, engine)


def _packed_sft(model: Any, engine: EngineConfig) -> type[Any]:
    from rlhf.offline.packed_rows import packed_sft

    return packed_sft(model, engine)


def _share_rows(models: Any, engine: EngineConfig) -> None:
    from policy.shared_engine import share_rows

    share_rows(models, engine)


def register() -> None:
    """Let stages, PEFT and generators know them."""
    terms.VERIFIERS.update(VERIFIERS)
    terms.SCORERS[TermKind.environment] = EnvironmentScorer
    adapters.register(ALL, quantized.HOLDING)
    base.OPTIMIZERS.update(optimizers.ALL)
    loading.LOADERS[3] = parts.PartsLoader
    loading.SHARING["online"] = _share_rows
    loading.TRAINERS |= {"shared": _sharing_sft, "packed": _packed_sft}
    rollout.ENGINES[Carrier.modules] = ModulesGenerator
    rollout.PLACES[Carrier.modules] = check_places
    rollout.ENGINES[Carrier.embeds] = EmbedsGenerator
    rollout.APART[RolloutBackend.server] = ServerGenerator
    rollout.APART_CHECKS[RolloutBackend.server] = check_servers
    for kind in EnvironmentKind:
        if kind is not EnvironmentKind.none:
            rollout.ENVIRONMENTS[kind] = _acting


def _acting(environment: EnvironmentConfig, tokenizer: Any) -> rollout.Acting:
    """How a policy acts in an environment of the configuration. Raises UserError."""
    make = factory.make_factory(environment, tokenizer)
    return episodes.InEnvironment(tokenizer, environment, make, factory.tools_of(environment))
