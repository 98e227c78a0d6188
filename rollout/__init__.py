"""Prompts in, responses with their logprobs out: by vLLM, or by transformers where vLLM is not
installed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from conf.adapters import virtual_tokens
from conf.choices import Carrier, LoraSync, RolloutBackend
from conf.reward import EnvironmentConfig, EnvironmentKind
from conf.schema import AdapterConfig, Config, DataConfig, RolloutConfig, generator_of
from rlhf.types import AdapterWeights, Generator, Prompt, UserError

# Ways of adapters into vLLM's engine that are neither whole weights nor a LoRA: what makes a
# generator of the arguments of `rollout.vllm.VLLMGenerator` and `adapter`, one like those of later
# syncs. rlhf/stages/methods.py fills it, so that no stage depends on them.
ENGINES: dict[Carrier, Callable[..., Generator]] = {}
# Checks of such adapters' places, by transformers' model type and the paths of modules, before
# anything loads. They raise UserError.
PLACES: dict[Carrier, Callable[[str, Sequence[str]], None]] = {}
# Generators in processes of their own: what makes one of the arguments of
# `rollout.vllm.VLLMGenerator` and the run's folder, and what checks its options and the carrier
# before anything loads. Filled like ENGINES.
APART: dict[RolloutBackend, Callable[..., Generator]] = {}
APART_CHECKS: dict[RolloutBackend, Callable[..., None]] = {}


class Acting:
    """Lets a policy act in an environment; this one where there is none."""

    def check(self, prompts: Sequence[Prompt], data: DataConfig) -> None:
        """Turns can be joined behind these prompts, which have room for what the environment shows.
        Logs what is worth a warning. Raises UserError.
        """

    def around(self, generator: Generator, data: DataConfig, rollout: RolloutConfig) -> Generator:
        """What writes responses to `data`: `generator`, or episodes whose turns it writes."""
        return generator


# Environments, by kind, of the options and the policy's tokenizer (None where it can't be known
# yet). They raise UserError. Filled like ENGINES.
ENVIRONMENTS: dict[EnvironmentKind, Callable[[EnvironmentConfig, Any], Acting]] = {}


def acting_in(environment: EnvironmentConfig, tokenizer: Any) -> Acting:
    """What lets a policy act in the environment. Raises UserError."""
    if environment.kind is EnvironmentKind.none:
        return Acting()
    return ENVIRONMENTS[environment.kind](environment, tokenizer)


def resolve_backend(backend: RolloutBackend) -> RolloutBackend:
    """`conf.schema.generator_of`. Raises UserError."""
    try:
        return generator_of(backend)
    except ValueError as error:
        raise UserError(str(error)) from error


def make_generator(
    cfg: Config,
    *,
    model_path: str,
    tokenizer: Any,
    model_factory: Callable[[], Any],
    carrier: Carrier = Carrier.merged,
    adapter_rank: int | None = None,
    native: bool = False,
    adapter: AdapterWeights | None = None,
) -> Generator:
    """A generator that starts from `model_path` (vLLM) or from what `model_factory` builds
    (transformers).

    `carrier`: what syncs send; whole weights, or an adapter that `model_factory` has attached.
    `adapter_rank`: of a LoRA. `native`: what `model_factory` builds wears an adapter that whole
    weights can't hold, so transformers generates. `adapter`: one like those of later syncs, which
    generators of another kind of adapter start with. Raises UserError, before weights load, for
    what the model or the backend can't do.
    """
    from rlhf.models.loading import resolve_dtype
    from rlhf.process import distributed

    backend = RolloutBackend.hf if native else resolve_backend(cfg.rollout.backend)
    response = cfg.environment.longest(cfg.rollout.max_response_length)
    lengths = (cfg.data.max_prompt_length, response)
    model_config = _read_config(model_path, trust_remote_code=cfg.model.trust_remote_code)
    ahead = virtual_tokens(cfg.adapter)
    _check_positions(model_config, model_path, lengths, cfg.environment, ahead)
    if backend is RolloutBackend.hf:
        from rollout.hf import HFGenerator
        from rollout.sampling import Sampling

        return HFGenerator(
            model_factory,
            tokenizer,
            Sampling.from_config(cfg.rollout),
            max_tokens=sum(lengths),
            max_num_seqs=cfg.rollout.max_num_seqs,
            device=distributed.device(),
        )
    names = _hub_names(model_config, cfg.model.trust_remote_code)
    _check_carrier(cfg.adapter, carrier, model_config.model_type if names.joins else None)
    options: dict[str, Any] = {
        "max_tokens": sum(lengths),
        "names": names,
        "dtype": resolve_dtype(cfg.model.dtype),
        "trust_remote_code": cfg.model.trust_remote_code,
    }
    if backend in APART:
        APART_CHECKS[backend](cfg.rollout, carrier, dry_run=False)
        folder = Path(cfg.run.dir).expanduser() / cfg.run.name
        options |= {"adapter_rank": adapter_rank, "folder": folder}
        return APART[backend](model_path, tokenizer, cfg.rollout, **options)
    if carrier in ENGINES:
        return ENGINES[carrier](model_path, tokenizer, cfg.rollout, adapter=adapter, **options)
    from rollout.vllm import VLLMGenerator

    return VLLMGenerator(model_path, tokenizer, cfg.rollout, adapter_rank=adapter_rank, **options)


def lora_obstacle(model_path: str, *, trust_remote_code: bool) -> str | None:
    """Why vLLM applies no LoRA adapters to a model, in a clause; None where it does. Raises
    UserError where the model's configuration can't be read.
    """
    config = _read_config(model_path, trust_remote_code=trust_remote_code)
    if _hub_names(config, trust_remote_code).joins:
        return f"{config.model_type} has experts, whose adapters vLLM does not take"
    from rollout.vllm import takes_loras

    if not all(takes_loras(name) for name in config.architectures or [""]):
        return f"vLLM applies no LoRA adapters to {config.model_type}"
    return None


def _check_carrier(adapter: AdapterConfig, carrier: Carrier, experts: str | None) -> None:
    """vLLM takes the adapter in the form in which it is sent. `experts`: the family, where it has
    some. Raises UserError.
    """
    if carrier is Carrier.lora and experts is not None and adapter.targets == ["all-linear"]:
        raise UserError(
            f"adapter.targets=[all-linear]: {experts} has experts, whose adapters vLLM does not "
            f"take. Set rollout.lora_sync={LoraSync.merged.value}, or name the attention's layers "
            "in adapter.targets."
        )
    if carrier is Carrier.lora and adapter.dora:
        raise UserError(
            f"rollout.lora_sync={LoraSync.adapter.value}: vLLM does not apply DoRA adapters. Set "
            "rollout.lora_sync=merged (or auto)."
        )
    if carrier not in (Carrier.lora, Carrier.merged, *ENGINES):
        raise UserError(
            f"rollout=vllm has no way for adapter.kind={adapter.kind.value}. Set rollout=hf."
        )


def _read_config(model_path: str, *, trust_remote_code: bool) -> Any:
    """The model's configuration. Raises UserError where it can't be read."""
    from transformers import AutoConfig

    from rlhf.models.directories import readable

    with readable(f"the model {model_path}: its configuration"):
        return AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)


def _check_positions(
    config: Any,
    model_path: str,
    lengths: tuple[int, int],
    environment: EnvironmentConfig,
    ahead: int = 0,
) -> None:
    """A prompt and a response of so many tokens fit into the model's positions behind `ahead`
    virtual ones. Raises UserError where they don't.
    """
    prompt, response = lengths
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt + response > positions - ahead:
        left = positions - ahead
        raise UserError(
            f"data.max_prompt_length={prompt} + {environment.longest_option}={response} = "
            f"{prompt + response} tokens, but the model in {model_path} has {left} positions for "
            f"them: lower one of them to add up to at most {left}."
        )


def _hub_names(config: Any, trust_remote_code: bool) -> Any:
    """The hub's names of the model's tensors, from its configuration alone: no weights are
    loaded. Raises UserError for one that transformers can't build a model from.
    """
    import torch

    from rlhf.models.facts import language_class
    from rollout.weights import HubNames

    kind = language_class(config)
    try:
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(
            f"rollout=vllm: the names of {config.model_type}'s weights can't be known from its "
            f"configuration alone ({shorten(str(error), 200, placeholder=' ...')}). "
            "Set rollout=hf."
        ) from error
    return HubNames(model)
