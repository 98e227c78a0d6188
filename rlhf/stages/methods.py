"""The step before every stage that loads models: all ways to train beside a frozen model are made
known (policy/adapters/). The only importer of the methods' files.
"""

from conf.choices import AdapterKind
from policy import adapters
from policy.adapters import lora, lora_mini, rasa

ALL = {
    AdapterKind.lora: lora.METHOD,
    AdapterKind.lora_mini: lora_mini.METHOD,
    AdapterKind.rasa: rasa.METHOD,
}


def register() -> None:
    """Let stages and PEFT know them."""
    adapters.register(ALL)
