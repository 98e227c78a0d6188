"""The step before every stage that loads models: all ways to train beside a frozen model are made
known (policy/adapters/), and their ways into vLLM's engine (rollout/). The only importer of the
methods' files.
"""

import rollout
from conf.choices import AdapterKind, Carrier
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
from rollout.embeds import EmbedsGenerator
from rollout.modules import ModulesGenerator, check_places

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


def register() -> None:
    """Let stages, PEFT and generators know them."""
    adapters.register(ALL, quantized.HOLDING)
    rollout.ENGINES[Carrier.modules] = ModulesGenerator
    rollout.PLACES[Carrier.modules] = check_places
    rollout.ENGINES[Carrier.embeds] = EmbedsGenerator
