"""Two states of a policy that are LoRA adapters of the same weights, or one of them these weights
themselves: one engine swaps the adapters, and one model of transformers wears both.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safetensors import safe_open

from conf.choices import Carrier, LoraSync, RolloutBackend
from conf.schema import RolloutConfig, vllm_lora_rank
from policy.model import is_peft, no_gather
from policy.saving import adapter_weights, named
from rlhf.models.directories import (
    ADAPTER_CONFIG,
    Adapter,
    Contents,
    adapter_name,
    contents,
    fingerprint,
    readable,
)
from rlhf.models.loading import load_causal_lm
from rlhf.process.libraries import first_line
from rlhf.stages.evaluation.policies import Asked, model_at
from rlhf.types import Prompt, Rollout, UserError
from rollout import resolve_backend

LOG = logging.getLogger("rlhf.stages.eval")
BEFORE, AFTER = "before", "after"
# in PEFT's model, which looks for them inside of tensors' names: no module is called so
_PEFT_NAMES = {BEFORE: "policy_before", AFTER: "policy_after"}
# Fields of adapter_config.json that make of an adapter something else than a LoRA of linear layers
# alone, as vLLM and this comparison take it.
_OTHER_THAN_LORA = (
    *("use_dora", "lora_bias", "modules_to_save", "target_parameters", "layer_replication"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "use_qalora"),
)
_HALVES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class OneBase:
    """What two paths have in common."""

    weights: str  # a directory or a hub's name
    adapters: dict[str, Adapter]  # by BEFORE and AFTER; without one: the weights themselves
    rank: int  # the largest of a layer


# ---- whether they are ----


def one_base(rollout: RolloutConfig, before: str, after: str) -> OneBase | None:
    """What the two paths have in common where vLLM could swap their adapters, as far as their files
    tell; None where whole weights are compared. Raises UserError where
    ``rollout.lora_sync=adapter`` asks for what can't be.
    """
    if rollout.lora_sync is LoraSync.merged:
        return None
    backend = resolve_backend(rollout.backend)
    if backend is not RolloutBackend.vllm:
        without_swapping(rollout, f"rollout={backend.value} does not swap adapters")
        return None
    old, new = contents(before, "stage.before"), contents(after, "stage.after")
    reason = _obstacle(old, new)
    if reason is None:
        found = _common(old, new)
        try:
            vllm_lora_rank(found.rank, rollout.max_lora_rank, "the adapters' rank")
            return found
        except ValueError as error:
            reason = str(error)
    without_swapping(rollout, reason)
    return None


def without_swapping(rollout: RolloutConfig, reason: str) -> None:
    """Tell why whole weights are compared. Raises UserError with ``rollout.lora_sync=adapter``."""
    if rollout.lora_sync is LoraSync.adapter:
        raise UserError(
            f"rollout.lora_sync=adapter: stage.before and stage.after can't be swapped as adapters "
            f"of one base: {reason}. Set rollout.lora_sync=auto."
        )
    LOG.debug("whole weights are compared: %s", reason)


def _obstacle(old: Contents, new: Contents) -> str | None:
    """Why two paths are no adapters of one base that can be swapped, in a clause."""
    if not (old.adapters or new.adapters):
        return "both are whole weights"
    if not old.has_config and old.is_local:
        return f"{old.weights} holds no config.json"
    if not _same_weights(old.weights, new.weights):
        return f"{old.path} rests on {old.weights}, {new.path} on {new.weights}"
    for held in (old, new):
        if len(held.adapters) > 1:
            return f"{held.path} is an adapter of an adapter"
        for adapter in held.adapters:
            reason = _other_than_lora(adapter)
            if reason is not None:
                return f"{held.path} {reason}"
    return None


def _same_weights(one: str, other: str) -> bool:
    if one == other:
        return True
    known = fingerprint(one)
    return known is not None and fingerprint(other) == known


def _other_than_lora(adapter: Adapter) -> str | None:
    """What makes an adapter another one than a plain LoRA of linear layers, in a clause."""
    if adapter.kind != "LORA":
        return f"is of the kind {adapter.kind}"
    config = _config(adapter)
    for name in _OTHER_THAN_LORA:
        if config.get(name):
            return f"has {name}={config[name]}"
    bias, start = config.get("bias", "none"), config.get("init_lora_weights")
    if bias != "none":
        return f"has bias={bias}"
    if isinstance(start, str):
        return f"has init_lora_weights={start}"
    with readable(f"the adapter {adapter.directory}"):
        file = str(adapter.directory / "adapter_model.safetensors")
        with safe_open(file, "pt") as held:
            names = list(held.keys())
    for name in names:
        if not name.endswith(_HALVES):
            return f"holds {name}, which is no LoRA of a linear layer"
    return None


def _config(adapter: Adapter) -> dict[str, Any]:
    with readable(f"the adapter {adapter.directory}"):
        text = (adapter.directory / ADAPTER_CONFIG).read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
    return config


def _common(old: Contents, new: Contents) -> OneBase:
    """Of two paths without an obstacle."""
    adapters: dict[str, Adapter] = {}
    rank = 0
    for state, held in ((BEFORE, old), (AFTER, new)):
        for adapter in held.adapters:
            adapters[state] = adapter
            config = _config(adapter)
            pattern = config.get("rank_pattern") or {}
            rank = max(rank, config["r"], *pattern.values())
    return OneBase(old.weights, adapters, rank)


@contextmanager
def _taken(name: str) -> Iterator[None]:
    """Around a sync of an adapter: an engine that does not take it becomes a UserError."""
    try:
        yield
    # such as for layers that vLLM's code for a family has no LoRA of
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"rollout=vllm does not take the adapter {name} ({first_line(error)}). Set "
            "rollout.lora_sync=merged."
        ) from error


# ---- both states ----


class Swapped:
    """Both states of a policy on one model of transformers, which wears one at a time: `before` and
    `after` give it as that state, until the other is asked for.
    """

    def __init__(self, asked: Asked, common: OneBase) -> None:
        self._asked, self._common = asked, common

    @cached_property
    def _model(self) -> Any:
        """PEFT's model with the adapters of both states."""
        from peft import PeftModel

        options = model_at(self._asked.model, self._common.weights)
        model = load_causal_lm(options, self._asked.tokenizer)
        for state, adapter in self._common.adapters.items():
            place = str(adapter.directory)
            with readable(f"the adapter {place}"), warnings.catch_warnings():
                # PEFT would fill missing weights with random numbers.
                warnings.filterwarnings("error", message="Found missing adapter keys")
                if is_peft(model):
                    model.load_adapter(place, adapter_name=_PEFT_NAMES[state])
                else:
                    name = _PEFT_NAMES[state]
                    model = PeftModel.from_pretrained(model, place, adapter_name=name)
        return model.eval()

    def before(self) -> Any:
        return self._as(BEFORE)

    def after(self) -> Any:
        return self._as(AFTER)

    def _as(self, state: str) -> Any:
        model = self._model
        if state in self._common.adapters:
            model.base_model.enable_adapter_layers()
            model.set_adapter(_PEFT_NAMES[state])
        else:
            model.base_model.disable_adapter_layers()
        return model

    def generate(
        self, prompts: Sequence[Prompt], phase: Callable[[str], None]
    ) -> tuple[list[Rollout], list[Rollout]]:
        """Both states' responses with the same seeds, by one engine of the base that gets each
        adapter and proves that it computes what transformers does. `phase` is told what goes on.
        """
        asked, common = self._asked, self._common
        names = self._names()
        listed = ", ".join(names.values())
        LOG.info("one engine of %s swaps its adapters: %s", common.weights, listed)
        generator = asked.make_generator(
            model_path=common.weights,
            model_factory=self.before,
            carrier=Carrier.lora,
            adapter_rank=common.rank,
        )
        written: dict[str, list[Rollout]] = {}
        try:
            version = 0
            for state in self._order():
                model = self._as(state)
                if state in names:
                    phase(f"sync {state}")
                    version += 1
                    weights_of = named(adapter_weights, names[state])
                    with _taken(names[state]):
                        generator.sync(weights_of(model, no_gather), version)
                phase(f"generate {state}")
                written[state] = asked.writing(generator).generate(prompts, **asked.drawing)
                asked.prove(generator, model, written[state], version)
        finally:
            generator.close()
        return written[BEFORE], written[AFTER]

    def _names(self) -> dict[str, str]:
        """Of the adapters in the engine, by their states: those under which they were saved, where
        these tell them apart.
        """
        names: dict[str, str] = {}
        for state, adapter in self._common.adapters.items():
            name = adapter_name(adapter)
            if name is None or name in names.values():
                return {state: state for state in self._common.adapters}
            names[state] = name
        return names

    def _order(self) -> list[str]:
        """The base before its adapter: the engine has none yet."""
        if BEFORE in self._common.adapters and AFTER not in self._common.adapters:
            return [AFTER, BEFORE]
        return [BEFORE, AFTER]
