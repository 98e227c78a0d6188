"""Checks of what a stage reads: the model's directory, the lengths it can take, the data files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.adapters import virtual_tokens
from conf.choices import AdapterKind, ModelKind, RolloutBackend, TermKind
from conf.reward import EnvironmentKind, RewardConfig
from conf.schema import (
    AdapterConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RolloutConfig,
    asked_tokens,
)
from conf.training import RewardStage, TrainStage
from rlhf.models.directories import check_model_path, check_native_taken, contents
from rlhf.models.loading import load_tokenizer, without_weights
from rlhf.models.templates import processor_of, template_text
from rlhf.process.files import json_object
from rlhf.types import UserError

_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_ORIGINAL = "original_max_position_embeddings"
_RESPONSE = "rollout.max_response_length"


# ---- held-out rows ----


def check_held_out(data: DataConfig, needs: Mapping[str, Any]) -> None:
    """Without held-out rows no option is set that looks at them: `needs`, by key, where the value
    says that it does. Raises UserError.
    """
    if data.holds_out:
        return
    for key, value in needs.items():
        if value:
            raise UserError(
                f"{key}={value} looks at held-out rows, but data.eval_fraction=0 holds none out. "
                f"Leave {key} out, or give data.eval_path or data.eval_fraction above 0."
            )


# ---- the model ----


def check_model(model: ModelConfig) -> None:
    """``model.path`` is a model's directory, and ``model.gguf_file`` is in it. Raises UserError."""
    if model.kind is ModelKind.pretrained or model.path is not None:
        check_model_path(model.path)
    check_gguf_file(model)


def check_trained(model: ModelConfig) -> None:
    """`check_model` of a model that a stage trains: all of it is weights. Raises UserError."""
    check_model(model)
    if model.path is not None:
        check_native_taken(contents(model.path), taken=False)


def check_added_tokens(model: ModelConfig, adapter: AdapterConfig, stage: TrainStage) -> None:
    """The rows of tokens that are added train: an adapter has to have embedding and head beside it
    (adapter.save_whole). Raises UserError.
    """
    if not asked_tokens(model):
        return
    what = f"model.add_tokens={asked_tokens(model)}"
    if model.gguf_file is not None:
        raise UserError(f"{what}: a GGUF file's tokenizer can't be added to. Give safetensors.")
    if adapter.kind is AdapterKind.none:
        if not stage.train.everything:
            raise UserError(
                f"{what}: their rows have to be learned, but stage.train leaves weights out. "
                "Train all of them (stage.train at its defaults)."
            )
        return
    if model.path is None:
        raise UserError(f"{what} with an adapter needs model.path. Set it, or adapter=none.")
    bare = without_weights(model, classifier=isinstance(stage, RewardStage))
    if bare is None:
        raise UserError(f"{what} with an adapter needs a model in a directory. Set adapter=none.")
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise UserError(
            f"{what}: embedding and head of {model.path} are one weight (tied embeddings), of "
            f"which adapter={adapter.kind.value} would train a copy. Set adapter=none."
        )
    parts = [part for part in (embedding, head) if part is not None]
    needed = [name for name, module in bare.named_modules() if any(module is p for p in parts)]
    ends = [name.rpartition(".")[2] for name in needed]
    missing = [end for end in ends if end not in adapter.save_whole]
    if missing:
        raise UserError(
            f"{what}: their rows have to be learned, but adapter={adapter.kind.value} trains "
            f"neither embedding nor head. Set adapter.save_whole=[{','.join(ends)}], or "
            "adapter=none."
        )


def check_native(paths: Iterable[str | None], backend: RolloutBackend) -> None:
    """vLLM is not asked for where an adapter stands beside its base. Raises UserError."""
    for path in paths:
        if path is not None and contents(path).is_native and backend is RolloutBackend.vllm:
            raise UserError(
                f"rollout=vllm: {path} holds an adapter that can't be merged into weights, for "
                "which only transformers generates in this stage. Set rollout=hf, or auto."
            )


def refuse_running_servers(rollout: RolloutConfig, stage: str) -> None:
    """A stage of several policies has no trainer that would send their weights to running servers.
    Raises UserError.
    """
    if rollout.servers:
        raise UserError(
            f"rollout.servers={rollout.servers}: stage={stage} reads policies from the disk, and "
            "does not send their weights to servers that are running. Set rollout=vllm."
        )


def check_gguf_file(model: ModelConfig) -> None:
    """``model.gguf_file`` is in the directory ``model.path``. Raises UserError."""
    if model.gguf_file is None:
        return
    if model.path is None:
        raise UserError(
            f"model.gguf_file={model.gguf_file}: expected model.path, the directory that holds "
            "it, but it is not set."
        )
    directory = Path(model.path).expanduser()
    if directory.is_dir() and not (directory / model.gguf_file).is_file():
        names = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "none"
        raise UserError(
            f"model.gguf_file={model.gguf_file}: no such file in {directory}. GGUF files there: "
            f"{names}."
        )


def policy_tokenizer(model: ModelConfig, chat_template: str | None) -> Any:
    """The tokenizer of ``model.path``; None where it is not in a directory, or is in a GGUF file,
    which takes long to read. Raises UserError for one that can't be read.
    """
    if model.path is None or model.gguf_file is not None:
        return None
    if not Path(model.path).expanduser().is_dir():
        return None
    return load_tokenizer(model, chat_template)


def check_pictures(
    path: str | None,
    tokenizer: Any,
    rollout: RolloutConfig,
    environment: EnvironmentKind,
    scoring: Iterable[tuple[str, str | None]],
) -> bool:
    """Whether the policy of `path` reads pictures; `tokenizer` is its own, None where it is not on
    the disk. Raises UserError for what such a policy can't be combined with, by name. `scoring`:
    options and directories of reward models.
    """
    if tokenizer is None or processor_of(tokenizer) is None:
        return False
    reads = f"the policy {path} reads pictures"
    if environment is not EnvironmentKind.none:
        raise UserError(
            f"environment={environment.value}: {reads}, and an episode's turns are joined as texts "
            "alone. Set environment=none."
        )
    if rollout.backend is RolloutBackend.server:
        raise UserError(
            f"rollout={rollout.backend.value}: {reads}, and requests to a server hold texts alone. "
            "Set rollout=vllm, or rollout=hf."
        )
    for key, held in scoring:
        if held is not None:
            raise UserError(
                f"{key}={held}: {reads}, and a reward model scores the texts alone. Score with a "
                "verifier, or with a function, which gets the pictures as `images`."
            )
    return True


def padding_note(path: str | None, tokenizer: Any) -> list[str]:
    """A note where padding is the end-of-sequence token, which does no harm here. `tokenizer` is
    None where there is none to look at.
    """
    if tokenizer is None or tokenizer.pad_token_id != tokenizer.eos_token_id:
        return []
    return [
        f"model.path={path}: padding is the end-of-sequence token "
        f"{tokenizer.eos_token!r}. Masks come from lengths, so the end of a "
        "response still trains; to pad with another token, set pad_token in the model's "
        "tokenizer_config.json."
    ]


# ---- lengths ----


def max_positions(path: str | None) -> int | None:
    """The longest sequence, in tokens, by a model's config.json, without the places of its
    adapters' virtual tokens; None where it can't be known from the disk. Raises UserError for a
    config.json that can't be read.
    """
    content = _model_config(path)
    for name in _POSITIONS:
        if isinstance(content.get(name), int):
            return int(content[name]) - _ahead(path)
    return None


def _ahead(path: str | None) -> int:
    """Virtual tokens that the adapters of a model's directory put in front of every row."""
    return 0 if path is None else sum(adapter.ahead for adapter in contents(path).adapters)


def _model_config(path: str | None) -> dict[str, Any]:
    """A model directory's config.json; empty where there is none on the disk. Raises UserError for
    one that can't be read.
    """
    if path is None:
        return {}
    config_path = Path(contents(path).weights) / "config.json"
    if not config_path.is_file():
        return {}
    return json_object(config_path, "this model can't be loaded")


def rope_switch(path: str | None, ahead: int = 0) -> int | None:
    """The length in tokens above which a model turns all its positions otherwise (longrope: Ding et
    al. 2024, arXiv:2402.13753), for every row of a micro-batch as soon as one is longer; None for
    other models. `ahead`: virtual tokens, beside those of the model's own adapters.
    """
    content = _model_config(path)
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kinds = (rope.get("rope_type"), rope.get("type")) if isinstance(rope, dict) else ()
    if not any(kind in ("longrope", "su") for kind in kinds):
        return None
    switch = content.get(_ORIGINAL) or rope.get(_ORIGINAL)
    return switch - _ahead(path) - ahead if isinstance(switch, int) else None


def check_rope(
    model: ModelConfig,
    prompt: int,
    response: int,
    ahead: int = 0,
    *,
    option: str = _RESPONSE,
) -> None:
    """No row's logprobs depend on which rows share its micro-batch. `prompt`, `response`: most
    tokens; `ahead`: virtual ones; `option`: that gives `response`. Raises UserError.
    """
    switch = rope_switch(model.path, ahead)
    if switch is not None and prompt + response > switch:
        raise UserError(
            f"data.max_prompt_length={prompt} + {option}={response} = "
            f"{prompt + response} tokens: model.path={model.path} turns its positions otherwise "
            f"above {switch} tokens (longrope), for all rows of a micro-batch at once, so a short "
            "row's logprobs would depend on its neighbours. Lower one of them."
        )


def rope_note(model: ModelConfig, max_length: int, ahead: int = 0) -> list[str]:
    """The same for rows of a file, where it is a note: their labels stay what they are."""
    switch = rope_switch(model.path, ahead)
    if switch is None or max_length <= switch:
        return []
    return [
        f"model.path={model.path} turns its positions otherwise above {switch} tokens (longrope), "
        "for all rows of a micro-batch at once: shorter rows beside a longer one are read with "
        f"those too. stage.max_length={switch} avoids it."
    ]


def model_positions(model: ModelConfig, ahead: int = 0) -> tuple[str, int | None]:
    """What limits the policy's sequences, for messages, and the limit in tokens; `ahead`: virtual
    tokens of an adapter (`conf.adapters.virtual_tokens`), whose places it is without.
    """
    name = "model.tiny.max_positions"
    limit = model.tiny.max_positions if model.kind is ModelKind.tiny else None
    if model.path is not None:
        name, limit = f"model.path={model.path}: its positions", max_positions(model.path)
    if limit is None or not ahead:
        return name, limit
    return f"{name} without {ahead} virtual tokens", limit - ahead


def directory_positions(paths: Iterable[tuple[str, str | None]]) -> list[tuple[str, int | None]]:
    """The same for each option and model directory of `paths`."""
    return [(f"{key}={path}: its positions", max_positions(path)) for key, path in paths]


def check_row_length(max_length: int, model: ModelConfig, ahead: int = 0) -> None:
    """Rows of ``stage.max_length`` tokens fit the model behind `ahead` virtual ones. Raises
    UserError.
    """
    name, limit = model_positions(model, ahead)
    if limit is not None and max_length > limit:
        raise UserError(
            f"stage.max_length={max_length} tokens are more than the model reads ({name} "
            f"= {limit}). Set stage.max_length={limit} or less."
        )


def check_sequence_length(
    prompt: int,
    response: int,
    readers: Iterable[tuple[str, int | None]],
    *,
    option: str = _RESPONSE,
) -> None:
    """The longest prompt and response together, in tokens, fit every model that reads them; a
    reader is its name for messages and its positions. `option`: that gives `response`. Raises
    UserError.
    """
    for name, limit in readers:
        if limit is not None and prompt + response > limit:
            raise UserError(
                f"data.max_prompt_length={prompt} + {option}={response} = "
                f"{prompt + response} tokens "
                f"are more than the model reads ({name} = {limit}). Lower one of them."
            )


# ---- data ----


def check_template(data: DataConfig) -> None:
    """``data.chat_template`` can be read. Raises UserError."""
    if data.chat_template is not None:
        template_text(data.chat_template)


def refuse_pipeline(data: DataConfig, stage: str) -> None:
    """Only stage=data runs ``data.pipeline``: every other stage reads what it wrote. Raises
    UserError.
    """
    if data.pipeline:
        raise UserError(
            f"data.pipeline holds {len(data.pipeline)} steps, which stage={stage} doesn't run: run "
            "stage=data with it first, and give what that "
            "writes (train.jsonl, eval.jsonl) as data.path and data.eval_path."
        )


def check_virtual_tokens(
    adapter: AdapterConfig, engine: EngineConfig, *, packing: bool = False
) -> None:
    """Every row has the adapter's virtual tokens, if any, in front of it. Raises UserError."""
    if packing and virtual_tokens(adapter):
        raise UserError(
            f"stage.packing=true with adapter={adapter.kind.value}: virtual tokens stand in front "
            "of a whole sequence, so rows that share one would not all have them. "
            "Set stage.packing=false."
        )
    if engine.gradient_checkpointing and adapter.kind is AdapterKind.prefix:
        raise UserError(
            "engine.gradient_checkpointing=true with adapter=prefix: transformers drops the keys "
            "and values of a prefix where it recomputes layers. "
            "Set engine.gradient_checkpointing=false, or adapter=prompt."
        )


def check_acting_terms(reward: RewardConfig, environment: EnvironmentKind) -> None:
    """Terms that an environment gives have one. Raises UserError."""
    if environment is not EnvironmentKind.none:
        return
    for name, term in reward.terms.items():
        if term.kind is TermKind.environment:
            raise UserError(
                f"reward.terms.{name}.kind=environment needs an environment, but "
                "environment=none. Set environment, or leave the term out."
            )


def refuse_texts(environment: EnvironmentKind, reading: Sequence[str]) -> None:
    """`reading` has a note on each reward model that reads texts, and an episode is none. Raises
    UserError.
    """
    if environment is not EnvironmentKind.none and reading:
        raise UserError(
            f"environment={environment.value}: an episode can only be read as the policy's tokens, "
            f"but {reading[0]} Or set reward=environment."
        )
