"""How a stage on TRL's trainers begins: batch plan, engine, tokenizer, the model and its adapter,
and what the run's manifest says that it read.
"""

from pathlib import Path
from typing import Any

from conf.choices import EngineKind
from conf.schema import AdapterConfig, Config, EngineConfig
from policy.adapters import attach
from policy.engines.deepspeed import ensure_process_group, prepare_cpu
from policy.model import is_peft
from rlhf.checks import launch
from rlhf.data.reading import DataRequest, stage_texts
from rlhf.data.sources import data_files
from rlhf.models.loading import load_or_train_tokenizer
from rlhf.process import distributed
from rlhf.process.quiet import quiet_libraries
from rlhf.run.context import RunContext
from rlhf.types import UserError


def begin(cfg: Config) -> tuple[launch.BatchPlan, Any]:
    """Batch plan and tokenizer, and DeepSpeed's process group where it is the engine. Raises
    UserError.
    """
    ranks = distributed.world_size()
    plan = launch.plan_batches(cfg.stage.batch_size, cfg.engine.micro_batch_size, ranks)
    start_engine(cfg.engine)
    quiet_libraries()
    texts = stage_texts(DataRequest.of(cfg))
    return plan, load_or_train_tokenizer(cfg.model, cfg.data.chat_template, texts)


def start_engine(engine: EngineConfig) -> None:
    """DeepSpeed's process group; the torch engine needs none. Raises UserError for torch with
    several ranks.
    """
    if engine.kind is EngineKind.torch:
        distributed.require_one_process("engine=torch", launch.ONE_PROCESS_REMEDY)
        return
    prepare_cpu()
    ensure_process_group()


def check_positions(model_config: Any, longest: int) -> None:
    """Raises UserError when the longest row, in tokens, doesn't fit into the model's positions."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(
            f"the data has rows of {longest} tokens, but the model has {limit} positions. Set "
            f"stage.max_length={limit}."
        )


def with_adapter(model: Any, adapter: AdapterConfig, base: str | None, task: str) -> Any:
    """`model` with the configured adapter; `model` itself for ``adapter=none``.

    base: ``model.path``. A directory is recorded absolutely, so that the adapter finds its base
    from anywhere. task: PEFT's task type.
    """
    model = attach(model, adapter, task=task)
    directory = None if base is None else Path(base).expanduser()
    if is_peft(model) and directory is not None and directory.is_dir():
        model.peft_config["default"].base_model_name_or_path = str(directory.resolve())
    return model


def record_inputs(ctx: RunContext, kind: str) -> None:
    """Name in the run's manifest what it read: the model it starts from (as `kind`) and its data
    files.
    """
    ctx.add_parent(kind, ctx.cfg.model.path)
    for path in data_files(ctx.cfg.data):
        ctx.add_data(path)
