"""What ``stage=doctor`` says of memory: does the model that is asked about fit, and with which
setting.
"""

import shlex
from dataclasses import dataclass, replace
from typing import Any

from conf.schema import Config
from conf.stages import DoctorStage, OfflineStage, OnlineStage
from reward.base import is_set
from reward.terms import scoring_models
from rlhf.checks.memory import fit, tables
from rlhf.checks.memory.moments import machine_of
from rlhf.checks.memory.shapes import assumed_shape, can_plan, number, shapes_of
from rlhf.cli import config, presets
from rlhf.run.console import console
from rlhf.stages import methods
from rlhf.stages.examination.findings import Finding, State
from rlhf.types import UserError


@dataclass(frozen=True, slots=True)
class Answer:
    """`lines` in words, for the report; `renderables` for the terminal; `fits`: some way to train
    does, on some engine.
    """

    fits: bool
    lines: list[str]
    renderables: list[Any]
    notes: list[str]


_ANY_RATE = 1e-3
# of an assumed reward model, which lies whole on every rank; that of Llama 3 8B
_LARGEST_SCORER = 8_030_261_248


def planned(cfg: Config) -> Config:
    """`cfg` with the stage that ``stage.plan`` names, its rows as long as the data and rollout
    groups say. Raises UserError for no such stage.
    """
    doctor = cfg.stage
    assert isinstance(doctor, DoctorStage)
    try:
        stage = config.stage_preset(doctor.plan)
    except UserError as error:
        raise UserError(f"stage.plan={doctor.plan}: {error}") from error
    if not isinstance(stage, (OnlineStage, OfflineStage)):
        names = ", ".join(
            name
            for name in presets.choices("stage")
            if isinstance(config.stage_preset(name), (OnlineStage, OfflineStage))
        )
        raise UserError(f"stage.plan={doctor.plan} trains nothing. Stages that do: {names}.")
    if isinstance(stage, OfflineStage):
        stage = replace(
            stage, max_length=cfg.data.max_prompt_length + cfg.rollout.max_response_length
        )
    if stage.learning_rate is None:
        # no memory depends on it, and some adapters have none that is published
        stage = replace(stage, learning_rate=_ANY_RATE)
    return replace(cfg, stage=stage)


def answer(cfg: Config) -> Answer | None:
    """The tables; None where nothing says which model is asked about. Raises UserError for a model
    that can't be counted.
    """
    if not can_plan(cfg.model):
        return None
    # transformers takes seconds to import

    methods.register()
    chosen = planned(cfg)
    size, nodes = chosen.model.params, chosen.launch.nodes
    machine = machine_of(chosen.engine, size, all_devices=True, nodes=nodes)
    scoring = []
    if isinstance(chosen.stage, OnlineStage):
        scoring = scoring_models(chosen.reward, chosen.stage.watch)
    shapes, notes = shapes_of(chosen.model, scoring)
    unscored = not shapes.rewards and not is_set(chosen.reward)
    if isinstance(chosen.stage, OnlineStage) and unscored:
        scorer, likeness = shapes.policy, "the policy's size"
        if scorer.parameters > _LARGEST_SCORER:
            scorer = assumed_shape(_LARGEST_SCORER)
            likeness = f"{number(scorer.parameters)} parameters"
        shapes = replace(shapes, rewards=(("reward.path", scorer),))
        notes.append(
            f"a reward model of {likeness} is assumed; reward.path, reward.function or "
            "reward.terms say otherwise"
        )
    rows = fit.rows(chosen, shapes, machine)
    lines = tables.answers(rows, machine)
    names = (fit.configured(chosen), *fit.names_of(rows))
    fitting = [fit.recommended(rows, name) for name in names]
    best = next((row for row in fitting if row is not None), None)
    where = "device" if machine.cuda else "rank"
    title = (
        f"stage={chosen.stage.name}: GiB per {where} at the peak; host: GiB of all ranks; "
        f"LoRA of rank {chosen.adapter.rank}; *: recommended"
    )
    renderables = [tables.fit_table(rows, title, console().width)]
    if best is not None:
        renderables.append(tables.plan_table(best.plan, f"with {shlex.join(best.overrides)}"))
    sizes = f"micro-batches of {chosen.engine.micro_tokens} tokens"
    if isinstance(chosen.stage, OfflineStage):
        sizes = f"stage.batch_size={chosen.stage.batch_size}"
    response = chosen.environment.longest(chosen.rollout.max_response_length)
    option = chosen.environment.longest_option
    lengths = f"{chosen.data.max_prompt_length} + {response}"
    notes += [
        *machine.notes,
        f"rows of {lengths} tokens (data.max_prompt_length + {option}), {sizes}",
    ]
    notes += best.plan.notes if best is not None else ()
    return Answer(best is not None, lines, renderables, notes)


def check_plan(cfg: Config) -> tuple[Answer | None, Finding]:
    """Whether the model that is asked about fits, on the devices that are here or asked about."""
    try:
        found = answer(cfg)
    except UserError as error:
        return None, Finding(
            "memory plan",
            State.fail,
            str(error),
            "name a model's directory, or its size as model.params=7e9",
        )
    if found is None:
        return None, Finding(
            "memory plan",
            State.info,
            "not asked for",
            "model.path=<directory> or model.params=7e9, with engine.gpus=<number>",
        )
    remedy = (
        ""
        if found.fits
        else "more or larger devices (engine.gpus, engine.gpu_memory_gib), a smaller model, or "
        "shorter rows"
    )
    return found, Finding(
        "memory plan", State.ok if found.fits else State.fail, " ".join(found.lines), remedy
    )


def print_plan(found: Answer) -> None:
    for line in found.lines:
        console().print(line, markup=False, soft_wrap=True, style="bold")
    for renderable in found.renderables:
        console().print(renderable)
    for note in found.notes:
        console().print(f"  {note}", markup=False, soft_wrap=True)
