"""YAML, JSON and command lines of other toolkits as one mapping."""

from pathlib import Path

import pytest

from rlhf.migrate import reading, shell
from rlhf.types import UserError

SCRIPT = """#!/bin/bash
# accelerate launch nothing
set -x
MODEL=org/base
ARGS=(
   --learning_rate 1e-5
   # --seed 7
   --betas 0.9 0.95
)
NPROC_PER_NODE=4 CUDA_VISIBLE_DEVICES=0,1,2,3 \\
swift sft \\
    --model ${MODEL} \\
    # a comment between
    --dataset 'a/b#500' 'c/d' \\
    --packing --lr-name=x ${ARGS[@]} && echo done
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_command_with_variables_arrays_and_comments(tmp_path: Path) -> None:
    request = reading.read(write(tmp_path, "train.sh", SCRIPT), None)
    assert (request.toolkit, request.command, request.ranks) == ("swift", "sft", 4)
    assert request.values == {
        "model": "org/base",
        "dataset": ["a/b#500", "c/d"],
        "packing": True,
        "lr-name": "x",
        "learning_rate": 1e-5,
        "betas": [0.9, 0.95],
    }


def test_a_here_document_is_a_command(tmp_path: Path) -> None:
    text = (
        "read -r -d '' commands <<EOF\nopenrlhf.cli.train_rm \\\n   --adam.lr 9e-6 \\\n"
        "   --ckpt.load_enable\nEOF\ndeepspeed --module $commands\n"
    )
    request = reading.read(write(tmp_path, "rm.sh", text), None)
    assert (request.toolkit, request.command) == ("openrlhf", "train_rm")
    assert request.values == {"adam.lr": 9e-6, "ckpt.load_enable": True}


def test_of_several_commands_one_is_chosen(tmp_path: Path) -> None:
    text = "trl sft --model_name_or_path a\nls\ntrl dpo --model_name_or_path b\n"
    path = write(tmp_path, "both.sh", text)
    assert reading.read(path, 2).command == "dpo"
    with pytest.raises(UserError, match=r"migrate\.number"):
        reading.read(path, None)
    with pytest.raises(UserError, match=r"migrate\.number=3"):
        reading.read(path, 3)


def test_a_command_reads_the_file_that_it_names(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "stage: sft\nlearning_rate: 1e-4\n")
    script = write(tmp_path, "run.sh", "llamafactory-cli train base.yaml learning_rate=2e-5\n")
    request = reading.read(script, None)
    assert request.values == {"stage": "sft", "learning_rate": 2e-5}
    neighbour = write(tmp_path, "here.sh", "swift sft $HERE/base.yaml --seed 1\n")
    assert reading.read(neighbour, None).values["seed"] == 1
    lost = write(tmp_path, "lost.sh", "llamafactory-cli train nowhere.yaml\n")
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        reading.read(lost, None)


def test_the_docstring_of_a_python_example_has_its_command(tmp_path: Path) -> None:
    text = '"""\nRun:\n\npython trl/scripts/kto.py \\\n    --dataset_name a/b\n"""\nimport x\n'
    request = reading.read(write(tmp_path, "kto.py", text), None)
    assert (request.toolkit, request.command) == ("trl", "kto")
    assert request.values == {"dataset_name": "a/b"}


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("torchrun --nproc_per_node=4 --nnodes=2 swift/cli/sft.py", 8),
        ("accelerate launch --num_processes 6 --num_machines 2 trl/scripts/sft.py", 6),
        ("CUDA_VISIBLE_DEVICES=0,2 swift sft", 2),
        ("CUDA_VISIBLE_DEVICES=$DEVICES swift sft", None),
        ("swift sft", None),
    ],
)
def test_ranks(words: str, ranks: int | None, tmp_path: Path) -> None:
    assert reading.read(write(tmp_path, "a.sh", f"{words} --seed 1\n"), None).ranks == ranks


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("none", "none"),
        ("a/b#5", "a/b#5"),
        ('{"a": 1}', {"a": 1}),
        ("[1, 2]", [1, 2]),
    ],
)
def test_a_word_as_a_value(word: str, value: object) -> None:
    assert reading.scalar(word) == value


def test_inner_mappings_and_lists_become_keys() -> None:
    values = {
        "fsdp": {"offload": True, "more": {"deep": 1}},
        "datasets": [{"path": "a", "type": "alpaca"}, {"path": "b"}],
        "kept": {"inner": 1},
        "empty": {},
    }
    assert reading.flattened(values, ["kept"]) == {
        "fsdp.offload": True,
        "fsdp.more.deep": 1,
        "datasets": values["datasets"],
        "datasets[].path": ["a", "b"],
        "datasets[].type": "alpaca",
        "kept": {"inner": 1},
        "empty": {},
    }


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.yaml", "a: [1\n", "read"),
        ("a.json", "[1, 2]", "list"),
        ("a.sh", "echo hello\n", "no command"),
        ("a.py", "def f(:\n", "script"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, text: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=found):
        reading.read(write(tmp_path, name, text), None)


def test_quotes_that_do_not_close_are_no_command() -> None:
    assert shell.commands("echo 'open\nswift sft --seed 1") == [["swift", "sft", "--seed", "1"]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --steps $(expr 32 / 4 / 2)", ["a", "--steps", "4"]),
        ("RANKS=2\na --steps $(expr 32 / $RANKS)", ["a", "--steps", "16"]),
        ("a --date $(date +%s)", ["a", "--date", "$(date +%s)"]),
        ("a --steps $(expr 1 / 0)", ["a", "--steps", "$(expr 1 / 0)"]),
    ],
)
def test_sums_of_a_shell(line: str, words: list[str]) -> None:
    assert shell.commands(line)[-1] == words
