"""stage=migrate on small files of every toolkit: options by hand, nothing left out, and an
experiment that composes from the folder it is written to.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.choices import AdapterKind, EngineKind, Quantization, Scheduler, Selection
from conf.data import MigrateConfig
from conf.schema import Config
from rlhf.__main__ import main
from rlhf.cli import config
from rlhf.migrate.converting import Migration, flattened
from rlhf.migrate.tables import Fate
from rlhf.stages import migrate
from rlhf.types import UserError

DPO = """
model_name_or_path: org/base
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
pref_beta: 0.2
pref_loss: sigmoid
pref_ftx: 0.5
dataset: first,second
dataset_dir: sets
template: llama3
cutoff_len: 1024
output_dir: saves/base/dpo
save_steps: 500
report_to: none
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 5.0e-6
lr_scheduler_type: cosine
warmup_steps: 20
max_steps: 400
bf16: true
val_size: 0.1
plot_loss: true
optim: adamw_torch
use_galore: false
resume_from_checkpoint: null
"""
AXOLOTL = """
base_model: org/base
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: a/rows
    type: chat_template
    field_messages: talk
    message_property_mappings: {role: from, content: value}
  - path: json
    data_files: more.jsonl
    type: alpaca
    split: train[:200]
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
wandb_project:
special_tokens: {pad_token: "<pad>"}
fsdp_config: {offload_params: true, auto_wrap_policy: TRANSFORMER_BASED_WRAP}
output_dir: ./outputs/out
"""
SWIFT = """
NPROC_PER_NODE=2 swift rlhf --rlhf_type grpo --model org/base --tuner_type full \\
    --reward_funcs accuracy my.module.style --reward_weights 1 0.5 --dataset 'a/maths#100' \\
    --use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.5 \\
    --num_generations 8 --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \\
    --max_completion_length 512 --vllm_max_model_len 1536 --beta 0.02 --epsilon_high 0.28 \\
    --dynamic_sample true --torch_dtype bfloat16 --deepspeed zero2 --max_steps 50 \\
    --system 'You solve.' --learning_rate 1e-6 --output_dir out/grpo
"""
TRL = """
accelerate launch --num_processes 4 trl/scripts/kto.py --dataset_name a/judged \\
    --dataset_train_split train --model_name_or_path org/base --use_peft --lora_r 8 \\
    --per_device_train_batch_size 4 --learning_rate 5e-7 --beta 0.3 --warmup_steps 0.1 \\
    --undesirable_weight 1.5 --num_train_epochs 2 --eval_steps 250 --eval_strategy steps
"""
OPENRLHF = """
python3 -m openrlhf.cli.train_ppo_ray --actor.num_nodes 1 --actor.num_gpus_per_node 4 \\
    --actor.model_name_or_path org/base --reward.model_name_or_path org/rm --vllm.num_engines 2 \\
    --vllm.tensor_parallel_size 2 --train.batch_size 128 --rollout.batch_size 64 \\
    --rollout.n_samples_per_prompt 8 --rollout.max_new_tokens 512 --data.max_len 1024 \\
    --algo.advantage.estimator group_norm --algo.kl.init_coef 1e-3 --algo.kl.use_loss \\
    --algo.kl.estimator k3 --actor.eps_clip_low_high 0.2 0.28 --algo.dynamic_filtering_enable \\
    --algo.dynamic_filtering_range 0 1 --ds.zero_stage 3 --ds.adam_offload --actor.adam.lr 5e-7 \\
    --data.prompt_dataset a/prompts --data.input_key question --train.num_episodes 2
"""
FILES = {
    "llama_factory": ("dpo.yaml", DPO),
    "axolotl": ("axolotl.yml", AXOLOTL),
    "swift": ("grpo.sh", SWIFT),
    "trl": ("kto.sh", TRL),
    "openrlhf": ("ppo.sh", OPENRLHF),
}


def write(folder: Path, toolkit: str, more: str = "") -> Path:
    name, text = FILES[toolkit]
    path = folder / name
    path.write_text(text.rstrip("\n") + more + "\n", encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> Migration:
    return migrate.migrated(MigrateConfig(path=str(path), **options), path)


def composed(folder: Path, path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Config:
    """The configuration that the printed command stands for."""
    out = folder / "out"
    assert main(["stage=migrate", f"migrate.path={path}", f"migrate.out={out}", *more]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "rlhf"]
    return config.compose(words[3:])


@pytest.mark.parametrize("toolkit", FILES)
def test_every_key_has_a_line(toolkit: str, tmp_path: Path) -> None:
    path = write(tmp_path, toolkit)
    migration = read(path)
    assert migration.toolkit.name == toolkit
    own = [line.key for line in migration.lines if not line.is_default]
    assert len(own) == len(set(own)) > 10
    for line in migration.lines:
        assert line.answer.options or line.answer.note, line.key
    assert migration.with_fate(Fate.unknown) == []
    if path.suffix != ".sh":
        assert set(own) == set(flattened(yaml.safe_load(path.read_text()), migration.toolkit))


def test_llama_factory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composed(tmp_path, write(tmp_path, "llama_factory"), capsys)
    stage = cfg.stage
    assert (stage.name, stage.batch_size, cfg.engine.micro_batch_size) == ("dpo", 8, 2)
    assert (stage.steps, stage.warmup_ratio, stage.max_length) == (400, 0.05, 1024)
    assert (stage.beta, stage.weights, stage.learning_rate) == (0.2, [1.0, 0.5], 5e-6)
    assert [loss.value for loss in stage.losses] == ["sigmoid", "sft"]
    # alpha is twice the rank where LLaMA-Factory's file leaves it out
    assert (cfg.adapter.rank, cfg.adapter.alpha, cfg.adapter.targets) == (
        8,
        16,
        ["q_proj", "v_proj"],
    )
    assert (cfg.data.registry, cfg.data.dataset) == ("sets", "first,second")
    assert (cfg.data.chat_template, cfg.data.eval_fraction) == ("llama-3", 0.1)
    assert (cfg.run.dir, cfg.run.name, cfg.run.seed) == ("saves/base", "dpo", 42)


def test_axolotl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "axolotl")
    cfg = composed(tmp_path, path, capsys, "migrate.rows=3200", "migrate.ranks=2")
    # 2 rows x 8 micro-batches x 2 ranks, so 3200 rows are 100 steps
    assert (cfg.stage.batch_size, cfg.stage.eval_steps, cfg.stage.save_steps) == (32, 25, 100)
    assert (cfg.stage.scheduler, cfg.stage.min_rate) == (Scheduler.cosine, 0.1)
    assert (cfg.adapter.kind, cfg.adapter.quantize) == (AdapterKind.lora, Quantization.nf4)
    assert cfg.adapter.targets == ["all-linear"]
    rows, more = cfg.data.sources["rows"], cfg.data.sources["more_jsonl"]
    assert (rows.path, rows.format.value, rows.columns) == (
        "a/rows",
        "sharegpt",
        {"conversations": "talk"},
    )
    assert (more.path, more.format.value, more.split) == ("more.jsonl#200", "alpaca", "train")
    assert (cfg.engine.kind, cfg.engine.zero_stage, cfg.engine.gpus) == (EngineKind.deepspeed, 3, 2)
    assert cfg.engine.offload.value == "cpu"


@pytest.mark.parametrize(
    ("toolkit", "key"),
    [("llama_factory", "val_size"), ("axolotl", "val_set_size"), ("swift", None), ("trl", None)],
)
def test_files_without_held_out_rows_hold_none_out(
    toolkit: str, key: str | None, tmp_path: Path
) -> None:
    """LLaMA-Factory, axolotl, ms-swift and TRL evaluate nothing where a file does not ask."""
    path = write(tmp_path, toolkit)
    text = path.read_text()
    if key is not None:
        lines = [line for line in text.splitlines() if not line.startswith(key)]
        text = "\n".join(lines)
    path.write_text(text.replace("--eval_strategy steps", ""), encoding="utf-8")
    assert read(path).options["data.eval_fraction"] == 0
    if key is None:
        return
    path.write_text(f"{text}\n{key}: 0\n", encoding="utf-8")
    assert read(path).options["data.eval_fraction"] == 0
    path.write_text(f"{text}\n{key}: 0.2\n", encoding="utf-8")
    assert read(path).options["data.eval_fraction"] == 0.2


def test_added_tokens_are_taken_over(tmp_path: Path) -> None:
    path = write(tmp_path, "llama_factory", "\nadd_tokens: <a>,<b>\nresize_vocab: true")
    options = read(path).options
    assert options["model.add_tokens"] == ["<a>", "<b>"]
    assert options["adapter.save_whole"] == ["embed_tokens", "lm_head"]
    path = write(tmp_path, "axolotl", '\ntokens: ["<a>"]')
    more = 'pad_token: "<pad>", additional_special_tokens: ["<|b|>"]'
    path.write_text(path.read_text().replace('pad_token: "<pad>"', more))
    options = read(path).options
    assert options["model.add_tokens"] == ["<a>"]
    assert options["model.add_special_tokens"] == ["<|b|>"]
    path = write(tmp_path, "swift")
    path.write_text(path.read_text().rstrip() + " --new_special_tokens '<a>' '<b>'\n")
    assert read(path).options["model.add_special_tokens"] == ["<a>", "<b>"]
    path.write_text(path.read_text().replace("'<a>' '<b>'", "more.txt"))
    assert "model.add_special_tokens" not in read(path).options


def test_all_checkpoints_stay_where_the_limit_is_below_1(tmp_path: Path) -> None:
    path = write(tmp_path, "llama_factory", "\nsave_total_limit: -1")
    assert read(path).options["run.keep_checkpoints"] == 0


def test_checkpoints_of_weights_alone_are_taken_over(tmp_path: Path) -> None:
    key = "stage.save_optimizer"
    path = write(tmp_path, "llama_factory", "\nsave_only_model: true")
    assert read(path).options[key] is False
    path = write(tmp_path, "llama_factory", "\nsave_only_model: false")
    assert key not in read(path).options
    path = write(tmp_path, "axolotl", "\nsave_only_model: true")
    # fsdp, so ZeRO, which writes both together
    migration = read(path)
    assert key not in migration.options
    [line] = [one for one in migration.lines if one.key == "save_only_model"]
    assert line.answer.fate is Fate.impossible and "engine=zero3" in line.answer.note


def test_an_optimizer_of_8_bits_needs_one_process(tmp_path: Path) -> None:
    text = AXOLOTL.replace(
        "fsdp_config: {offload_params: true, auto_wrap_policy: TRANSFORMER_BASED_WRAP}\n", ""
    )
    path = tmp_path / "alone.yml"
    path.write_text(text, encoding="utf-8")
    assert read(path).options["stage.optimizer"] == "adamw_8bit"
    several = read(path, ranks=2)
    assert "stage.optimizer" not in several.options
    line = next(line for line in several.lines if line.key == "optimizer")
    assert line.answer.fate is Fate.impossible


def test_ranks_that_share_rows_are_one_for_the_batch(tmp_path: Path) -> None:
    text = "NPROC_PER_NODE=8 swift sft --model a --dataset b --sequence_parallel_size 4"
    path = tmp_path / "shared.sh"
    path.write_text(f"{text} --deepspeed zero3 --gradient_accumulation_steps 3\n", encoding="utf-8")
    options = read(path).options
    # 1 row x 3 micro-batches x 8 / 4 groups
    assert (options["engine.sequence_parallel"], options["stage.batch_size"]) == (4, 6)


def test_what_counts_in_epochs_needs_rows(tmp_path: Path) -> None:
    lines = {line.key: line.answer for line in read(write(tmp_path, "axolotl")).lines}
    for key in ("evals_per_epoch", "saves_per_epoch"):
        assert lines[key].fate is Fate.impossible
        assert "migrate.rows" in lines[key].note
    assert lines["wandb_project"].fate is Fate.idle


def test_swift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composed(tmp_path, write(tmp_path, "swift"), capsys)
    stage = cfg.stage
    # 8 responses x 2 ranks x 4 micro-batches, 8 to each prompt
    assert (stage.name, stage.prompts_per_step, stage.samples_per_prompt) == ("grpo", 8, 8)
    assert (stage.steps, stage.minibatches, stage.kl_coef) == (50, 1, 0.02)
    assert (stage.cliprange_high, stage.selection) == (0.28, Selection.unequal)
    assert (cfg.rollout.max_response_length, cfg.data.max_prompt_length) == (512, 1024)
    assert (cfg.rollout.backend.value, cfg.rollout.gpu_memory_utilization) == ("vllm", 0.5)
    style = cfg.reward.terms["style"]
    assert (style.function, style.weight) == ("my.module:style", 0.5)
    assert cfg.reward.terms["accuracy"].kind.value == "math"
    assert (cfg.data.path, cfg.engine.zero_stage, cfg.engine.gpus) == ("a/maths#100", 2, 2)
    assert cfg.data.system == "You solve."


def test_trl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composed(tmp_path, write(tmp_path, "trl"), capsys)
    stage = cfg.stage
    assert (stage.name, stage.batch_size, stage.epochs) == ("kto", 16, 2.0)
    # below 1 transformers reads warmup_steps as a share
    assert (stage.warmup_ratio, stage.eval_steps, stage.beta) == (0.1, 250, 0.3)
    assert (stage.undesirable_weight, stage.scheduler) == (1.5, Scheduler.linear)
    assert (cfg.adapter.rank, cfg.adapter.alpha, cfg.adapter.dropout) == (8, 32, 0.0)
    assert (cfg.data.path, cfg.data.split) == ("a/judged", "train")
    assert (cfg.engine.zero_stage, cfg.engine.gpus) == (0, 4)


def test_openrlhf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composed(tmp_path, write(tmp_path, "openrlhf"), capsys, "migrate.rows=640")
    stage = cfg.stage
    # 64 x 8 responses in optimizer steps of 128; 2 passes over 640 prompts
    assert (stage.name, stage.minibatches, stage.steps) == ("grpo", 4, 20)
    assert (stage.prompts_per_step, stage.samples_per_prompt) == (64, 8)
    assert (stage.cliprange, stage.cliprange_high, stage.kl_coef) == (0.2, 0.28, 1e-3)
    assert stage.kl_place.value == "loss"
    assert (cfg.data.max_prompt_length, cfg.rollout.max_response_length) == (512, 512)
    assert cfg.data.columns == {"prompt": "question"}
    assert (cfg.rollout.server.count, cfg.rollout.server.tensor_parallel) == (2, 2)
    assert (cfg.engine.zero_stage, cfg.engine.offload.value, cfg.engine.gpus) == (3, "cpu", 4)


def test_an_export_merges_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "merge.yaml"
    text = "model_name_or_path: org/base\nadapter_name_or_path: saves/lora\ntemplate: llama3\n"
    path.write_text(f"{text}export_dir: saves/merged\nexport_size: 5\n", encoding="utf-8")
    cfg = composed(tmp_path, path, capsys)
    assert (cfg.stage.name, cfg.model.path) == ("export", "saves/lora")
    assert (cfg.run.dir, cfg.run.name) == ("saves", "merged")


@pytest.mark.parametrize(
    ("command", "prompts", "samples", "minibatches"),
    [
        ("ppo --num_mini_batches 2", 32, 1, 2),  # 4 prompts x 2 x 4 ranks
        ("online_dpo", 32, 2, 1),
        ("grpo --num_generations 8", 4, 8, 1),  # 32 responses
        ("rloo --num_generations 4 --steps_per_generation 4", 16, 4, 2),
    ],
)
def test_batches_of_trls_online_trainers(
    command: str, prompts: int, samples: int, minibatches: int, tmp_path: Path
) -> None:
    path = tmp_path / "online.sh"
    rest = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --model_name_or_path a"
    launcher = "accelerate launch --num_processes 4 examples/scripts/"
    script, _, more = command.partition(" ")
    path.write_text(f"{launcher}{script}.py {more} {rest}\n", encoding="utf-8")
    options = read(path).options
    assert options["stage.prompts_per_step"] == prompts
    assert options["stage.samples_per_prompt"] == samples
    assert options["stage.minibatches"] == minibatches
    assert options["tracking"] == "none"


def test_a_critic_without_a_reward_model_starts_from_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "ppo.sh"
    command = "python -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path a"
    path.write_text(f"{command} --data.prompt_dataset b\n", encoding="utf-8")
    assert read(path).options["stage.critic_init"] == "policy"
    path.write_text(f"{command} --reward.model_name_or_path c\n", encoding="utf-8")
    assert "stage.critic_init" not in read(path).options


@pytest.mark.parametrize(("value", "fate"), [("main", Fate.idle), ("9d2fa1c", Fate.taken)])
def test_a_revision_is_taken_over(value: str, fate: Fate, tmp_path: Path) -> None:
    path = write(tmp_path, "llama_factory", f"\nmodel_revision: {value}")
    line = next(line for line in read(path).lines if line.key == "model_revision")
    assert line.answer.fate is fate


def test_an_unknown_key_is_listed_and_the_exit_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "llama_factory", "\nno_such_key: 3")
    out = tmp_path / "out"
    assert main(["stage=migrate", f"migrate.path={path}", f"migrate.out={out}"]) == 1
    captured = capsys.readouterr()
    assert "no_such_key" in captured.err
    assert (out / "experiment" / "dpo.yaml").is_file()
    assert "## Unknown" in (out / "dpo.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("stage: dpo\nfinetuning_type: lora\nimage_max_pixels: 5\n", "image_max_pixels"),
        (
            "model_name_or_path: a\nexport_dir: b\ntemplate: c\nexport_quantization_bit: 4\n",
            "export",
        ),
        ("base_model: a\nsequence_len: 8\nval_set_size: 0\nrl: ebft\n", "ebft"),
        ("learning_rate: 1\n", r"migrate\.toolkit"),
        ("dataset_name: a\nuse_peft: true\n", r"migrate\.stage"),
    ],
)
def test_another_task_is_refused_before_anything_is_written(
    text: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        read(path)


def test_a_file_without_its_stage_takes_one(tmp_path: Path) -> None:
    path = tmp_path / "trl.yaml"
    path.write_text("dataset_name: a\nuse_peft: true\nbeta: 0.5\n", encoding="utf-8")
    migration = read(path, stage="dpo")
    assert (migration.stage, migration.options["stage.beta"]) == ("dpo", 0.5)
    with pytest.raises(UserError, match=r"migrate\.stage=nothing"):
        read(path, stage="nothing")


def test_a_micro_batch_of_kto_has_two_answers(tmp_path: Path) -> None:
    text = DPO.replace("stage: dpo", "stage: kto").replace(
        "train_batch_size: 2", "train_batch_size: 1"
    )
    path = tmp_path / "kto.yaml"
    path.write_text(text, encoding="utf-8")
    options = read(path).options
    assert (options["stage.batch_size"], options["engine.micro_batch_size"]) == (4, 2)


def test_two_keys_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, "llama_factory", "\nrun_name: elsewhere")
    line = next(line for line in read(path).lines if line.key == "run_name")
    assert line.answer.fate is Fate.impossible
    assert "run.name" in line.answer.note


def test_an_adapters_options_are_left_out_where_all_weights_train(tmp_path: Path) -> None:
    text = FILES["llama_factory"][1].replace("finetuning_type: lora", "finetuning_type: full")
    path = tmp_path / "full.yaml"
    path.write_text(text, encoding="utf-8")
    migration = read(path)
    assert [key for key in migration.options if key.startswith("adapter.")] == []
    rank = next(line for line in migration.lines if line.key == "lora_rank")
    assert rank.answer.fate is Fate.idle


def test_a_path_may_have_blanks_and_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my config (1).yaml"
    path.write_text(DPO, encoding="utf-8")
    assert composed(tmp_path, path, capsys).stage.name == "dpo"
    assert (tmp_path / "out" / "experiment" / "my_config_1.yaml").is_file()


def test_an_experiment_with_the_name_of_ours_gets_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dpo_8b.yaml"
    path.write_text(DPO, encoding="utf-8")
    composed(tmp_path, path, capsys)
    assert (tmp_path / "out" / "experiment" / "dpo_8b_migrated.yaml").is_file()


def test_a_preset_that_is_nowhere_is_refused_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="experiment=nothing"):
        config.compose(["stage=sft", f"hydra.searchpath=[file://{tmp_path}]", "experiment=nothing"])
