"""Damaged files that are not rows: models, checkpoints, run directories, registries, ledgers,
labels. Each ends in an error of ours, or does no harm.

`make test` tries a few of each kind; `make fuzz` hundreds.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.choices import TrackingKind
from conf.schema import Config, ModelConfig, RunConfig, TrackingConfig
from conf.stages import SFTStage
from policy.saving import save_adapter
from reward.model import Manifest, load_reward_model, tokenizer_fingerprint, write_manifest
from rlhf.cli import config
from rlhf.data import llama_factory
from rlhf.models.loading import load_causal_lm, load_classifier, load_tokenizer
from rlhf.process import checkpoints
from rlhf.run.context import RunContext
from rlhf.types import UserError
from tests.checking import check
from tests.labels.labels import on_disk, pairs, say
from tests.labels.test_label_import import labels, rows_of, write
from tests.test_fuzz import JSON, fuzzed

pytestmark = pytest.mark.usefixtures("one_thread")
FEW, MANY = 8, 150
seen: Counter[str] = Counter()

BYTES = st.binary(min_size=1, max_size=16) | st.sampled_from(
    [b"\x00", b"\xff\xfe", b"{", b"[" * 2000, b"9" * 5000, b"NaN", b'"', b"\xed\xa0\x80"]
)
HOW = st.sampled_from(
    ["cut", "change", "change", "insert", "empty", "noise", "lose", "directory", "dangling"]
)
Damage = tuple[str, float, bytes]
DAMAGE = st.tuples(HOW, st.floats(0, 1, exclude_max=True), BYTES)


def damage(place: Path, given_: Damage) -> None:
    """Do to one file what disks, editors and half a download do."""
    how, where, data = given_
    content = place.read_bytes()
    at = int(where * len(content))
    place.unlink()
    if how == "directory":
        place.mkdir()
    elif how == "dangling":
        place.symlink_to(place.parent / "nowhere")
    elif how != "lose":
        changed = content[:at] + data + content[at + len(data) :]
        place.write_bytes(
            {
                "cut": content[:at],
                "change": changed,
                "insert": content[:at] + data + content[at:],
                "empty": b"",
            }.get(how, data)
        )


def put(place: Path, path: list[str | int], value: Any) -> None:
    """Another value in a JSON file, at a path of keys."""
    content = json.loads(place.read_text(encoding="utf-8"))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    place.write_text(json.dumps(content), encoding="utf-8")


def tried(kind: str, load: Callable[[], Any]) -> None:
    """Counts a good or a bad input; an error of any other kind passes, and fails the test."""
    try:
        load()
    except UserError as error:
        if len(str(error).strip()) < 20:
            raise AssertionError(f"{kind}: {error!r} says nothing") from error
        seen[f"{kind}: bad"] += 1
    else:
        seen[f"{kind}: good"] += 1


def copied(source: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))


# ---- models ----

# Values of a config.json that are wrong, none of which asks for more memory than there is.
VALUES = st.sampled_from(
    [
        None,
        -1,
        0,
        1,
        3,
        7,
        65,
        1.5,
        "",
        "x",
        "64",
        [],
        [1],
        {},
        {"a": 1},
        True,
        "llama",
        "gpt2",
        "\x00",
        1e-400,
    ]
)
MODEL_FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
]


@dataclasses.dataclass(frozen=True)
class Models:
    """A policy, a reward model and an adapter that are whole, and a folder for damaged copies."""

    policy: Path
    reward: Path
    adapter: Path
    folder: Path

    def use(self, place: Path) -> None:
        """What every stage does with a model: its checks before anything loads, tokenizer, weights,
        a forward pass.
        """
        cfg = ModelConfig(path=str(place))
        check(dataclasses.replace(base(), model=cfg))
        tokenizer = load_tokenizer(cfg)
        model = load_causal_lm(cfg, tokenizer)
        if (place / "config.json").exists():
            load_classifier(cfg, tokenizer)
        if model.config.vocab_size == 300 and len(tokenizer) <= 300:
            model(torch.tensor([tokenizer("the quick fox")["input_ids"]]))


@functools.cache
def base() -> Config:
    return config.compose(
        [
            "stage=sft",
            "tracking=none",
            "data.path=rows.jsonl",
            "model.path=policy",
            "stage.max_length=64",
        ]
    )


@pytest.fixture
def models(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Models:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n' * 4, encoding="utf-8"
    )
    policy, reward = Path(shutil.copytree(tiny_model(), tmp_path / "policy")), tmp_path / "reward"
    tokenizer = load_tokenizer(ModelConfig(path=str(policy)))
    load_classifier(ModelConfig(path=str(policy)), tokenizer).save_pretrained(reward)
    tokenizer.save_pretrained(reward)
    write_manifest(
        reward,
        Manifest("tiny", tokenizer_fingerprint(tokenizer), None, False, 32, "float32", 0.0, 1.0, 4),
    )
    adapter = tmp_path / "adapter"
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(
        load_causal_lm(ModelConfig(path=str(policy)), tokenizer),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    lora.peft_config["default"].base_model_name_or_path = str(policy)
    save_adapter(lora, adapter)
    tokenizer.save_pretrained(adapter)
    return Models(policy, reward, adapter, tmp_path / "copy")


def damaged_model(models: Models, name: str, how: Damage) -> None:
    place = copied(models.policy, models.folder)
    damage(place / name, how)
    tried(f"model, {name}", lambda: models.use(place))


def changed_config(models: Models, key: str, value: Any) -> None:
    place = copied(models.policy, models.folder)
    put(place / "config.json", [key], value)
    tried("model, a value of config.json", lambda: models.use(place))


def damaged_reward(models: Models, name: str, how: Damage) -> None:
    place = copied(models.reward, models.folder)
    damage(place / name, how)
    tried(f"reward model, {name}", lambda: load_reward_model(place, torch.float32))


def changed_manifest(models: Models, key: str, value: Any) -> None:
    place = copied(models.reward, models.folder)
    put(place / "reward_model.json", [key], value)
    tried("reward model, a value of its manifest", lambda: load_reward_model(place, torch.float32))


def damaged_adapter(models: Models, name: str, how: Damage) -> None:
    place = copied(models.adapter, models.folder)
    damage(place / name, how)
    tried(f"adapter, {name}", lambda: models.use(place))


CONFIG_KEYS = [
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
]
CONFIG_KEYS += [
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "dtype",
]
CONFIG_KEYS += ["eos_token_id", "pad_token_id", "rope_parameters", "attention_bias"]


def fuzz_models(models: Models, examples: int) -> None:
    fuzzed(examples)(
        given(st.sampled_from(MODEL_FILES), DAMAGE)(
            lambda name, how: damaged_model(models, name, how)
        )
    )()
    fuzzed(examples)(
        given(st.sampled_from(CONFIG_KEYS), VALUES)(
            lambda key, value: changed_config(models, key, value)
        )
    )()
    fuzzed(examples)(
        given(st.sampled_from([*MODEL_FILES[:3], "reward_model.json"]), DAMAGE)(
            lambda name, how: damaged_reward(models, name, how)
        )
    )()
    keys = [field.name for field in dataclasses.fields(Manifest)]
    fuzzed(examples)(
        given(st.sampled_from(keys), VALUES)(
            lambda key, value: changed_manifest(models, key, value)
        )
    )()
    fuzzed(examples)(
        given(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), DAMAGE)(
            lambda name, how: damaged_adapter(models, name, how)
        )
    )()


def test_models(models: Models) -> None:
    seen.clear()
    fuzz_models(models, FEW)
    assert sum(count for kind, count in seen.items() if kind.endswith("bad")) > FEW


@pytest.mark.parametrize("kind", ["policy", "reward", "adapter"])
def test_a_model_that_lacks_a_tensor_is_never_filled_with_random_numbers(
    models: Models, kind: str
) -> None:
    from safetensors.torch import load_file, save_file

    place = copied(getattr(models, kind), models.folder)
    file = place / ("adapter_model.safetensors" if kind == "adapter" else "model.safetensors")
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "q_proj" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"q_proj"):
        load_reward_model(place, torch.float32) if kind == "reward" else models.use(place)
    if kind == "policy":
        with pytest.raises(
            UserError, match=r"lack model\.layers\.0\.self_attn\.q_proj\.weight, so it is not whole"
        ):
            load_classifier(
                ModelConfig(path=str(place)), load_tokenizer(ModelConfig(path=str(place)))
            )


# ---- GGUF ----


def write_gguf(place: Path, tokens: list[str]) -> None:
    """A Llama of one layer in GGUF, as converters of others write it."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(place, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 48),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_rope_dimension_count, 16),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [1] * len(tokens)),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
        (writer.add_pad_token_id, 2),
    ):
        add(value)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "output": (len(tokens), 32),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf(folder: Path) -> None:
    cfg = ModelConfig(path=str(folder), gguf_file="model.gguf")
    load_causal_lm(cfg, load_tokenizer(cfg))


def damaged_gguf(whole: bytes, folder: Path, how: Damage) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "model.gguf").write_bytes(whole)
    damage(folder / "model.gguf", (how[0], how[1] ** 3, how[2]))  # mostly in the header
    tried("GGUF", lambda: load_gguf(folder))


def fuzz_gguf(folder: Path, examples: int) -> None:
    source = folder / "source"
    source.mkdir()
    write_gguf(source / "model.gguf", ["<s>", "</s>", "<pad>", "a", "b", "ab"])
    load_gguf(source)
    whole = (source / "model.gguf").read_bytes()
    fuzzed(examples)(given(DAMAGE)(lambda how: damaged_gguf(whole, folder / "damaged", how)))()


def test_gguf(tmp_path: Path) -> None:
    seen.clear()
    fuzz_gguf(tmp_path, FEW)
    assert seen["GGUF: bad"] > FEW / 4


# ---- checkpoints and run directories ----


def checkpoint(folder: Path) -> Path:
    """A run of three steps with a checkpoint of two, as a killed run leaves it."""
    place = folder / "runs" / "r" / "sft"
    shutil.rmtree(folder / "runs", ignore_errors=True)
    with checkpoints.written(place / "checkpoints" / "step-2", keep=2) as side:
        torch.save({"steps": 2, "masters": [torch.zeros(50)]}, side / "engine.pt")
        (side / "loop.json").write_text('{"step": 2}', encoding="utf-8")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (place / name).write_text(
            "".join(
                json.dumps({"step": step, "time_s": 1.0, "loss": 1.5}) + "\n" for step in (1, 2, 3)
            ),
            encoding="utf-8",
        )
    (place / "config.yaml").write_text("stage:\n  name: sft\nrun:\n  seed: 0\n", encoding="utf-8")
    (place / "manifest.json").write_text(
        json.dumps({"stage": "sft", "starts": [{"time": "t"}], "parents": [], "data": []}),
        encoding="utf-8",
    )
    return place


INSIDE = ["engine.pt", "loop.json", checkpoints.SEAL]
BESIDE = ["metrics.jsonl", "samples.jsonl", "config.yaml", "manifest.json"]


def damaged_run(folder: Path, name: str, how: Damage) -> None:
    """A damaged checkpoint must never be gone on from; any other damage is said or does no harm."""
    place = checkpoint(folder)
    file = place / "checkpoints" / "step-2" / name if name in INSIDE else place / name
    before = file.read_bytes()
    damage(file, how)
    cfg = Config(
        stage=SFTStage(),
        run=RunConfig(dir=str(folder / "runs"), name="r", resume=True),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )

    def resume() -> None:
        ctx = RunContext.open(cfg)
        ctx.tracker.finish()
        if (
            name in INSIDE
            and ctx.resume_from is not None
            and (not file.is_file() or (file.read_bytes() != before and name != checkpoints.SEAL))
        ):
            raise AssertionError(
                f"the run goes on from a checkpoint whose {name} is damaged ({how[0]})"
            )
        if name in INSIDE and ctx.resume_from is None:
            raise UserError(f"{name} was passed over, as it should be")

    tried(f"run directory, {name}", resume)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run opens without asking git and every package's version, and warns to nobody."""
    monkeypatch.setattr("rlhf.run.manifest.git_commit", lambda: None)
    monkeypatch.setattr("rlhf.run.manifest.versions", dict)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def fuzz_runs(folder: Path, examples: int) -> None:
    fuzzed(examples)(
        given(st.sampled_from(INSIDE), DAMAGE)(lambda name, how: damaged_run(folder, name, how))
    )()
    fuzzed(examples)(
        given(st.sampled_from(BESIDE), DAMAGE)(lambda name, how: damaged_run(folder, name, how))
    )()


@pytest.mark.usefixtures("quick")
def test_run_directories(tmp_path: Path) -> None:
    seen.clear()
    fuzz_runs(tmp_path, 2 * FEW)
    assert sum(count for kind, count in seen.items() if kind.endswith("bad")) > FEW


# ---- registries ----

ENTRY = {
    "file_name": "rows.json",
    "formatting": "alpaca",
    "columns": {"prompt": "instruction"},
    "tags": {"role_tag": "from"},
    "num_samples": 2,
}
ENTRIES = st.dictionaries(
    st.sampled_from([*ENTRY, "ranking", "subset", "split", "folder", "script_url", "x"]),
    JSON | st.just("../rows.json"),
)


def read_registry(folder: Path) -> None:
    for source in llama_factory.sources(folder / "dataset_info.json", "one"):
        list(source.notes)


def strange_registry(folder: Path, changes: dict[str, Any], how: Damage | None) -> None:
    (folder / "rows.json").write_text(
        json.dumps([{"instruction": "a", "output": "b"}]), encoding="utf-8"
    )
    place = folder / "dataset_info.json"
    if place.is_dir() and not place.is_symlink():
        place.rmdir()
    place.unlink(missing_ok=True)
    place.write_text(json.dumps({"one": ENTRY | changes}), encoding="utf-8")
    if how is not None:
        damage(place, how)
    tried("registry", lambda: read_registry(folder))


def fuzz_registries(folder: Path, examples: int) -> None:
    fuzzed(examples)(
        given(ENTRIES, st.none() | st.none() | DAMAGE)(
            lambda changes, how: strange_registry(folder, changes, how)
        )
    )()


def test_registries(tmp_path: Path) -> None:
    seen.clear()
    fuzz_registries(tmp_path, 3 * FEW)
    assert seen["registry: bad"] > FEW


# ---- ledgers and labels ----

LEDGER = ["export.json", "tasks.jsonl", "labels.jsonl"]


def damaged_labels(folder: Path, source: Path, name: str, how: Damage) -> None:
    place = folder / "t"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    copied(source / "runs", place / "runs")
    shutil.copy(source / "labels.jsonl", place / "labels.jsonl")
    damage(
        place / "labels.jsonl" if name == "labels.jsonl" else place / "runs" / "t" / "label" / name,
        how,
    )
    tried(f"labels, {name}", lambda: labels(place, place / "labels.jsonl"))


def fuzz_labels(folder: Path, examples: int) -> None:
    source = folder / "source"
    made = pairs(3)
    on_disk(made, source / "runs" / "t" / "label")
    write(
        source / "labels.jsonl", rows_of([say(task, task.answers[0].text) for task in made.tasks])
    )
    fuzzed(examples)(
        given(st.sampled_from(LEDGER), DAMAGE)(
            lambda name, how: damaged_labels(folder, source, name, how)
        )
    )()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stage without a second of matplotlib and Hydra for every example."""
    composed = config.compose(["stage=label", "label.mode=import", "tracking=none"])

    whole = config.compose

    def quickly(given_: list[str]) -> Config:
        if "label.mode=import" not in given_:
            return whole(given_)
        options = dict(one.split("=", 1) for one in given_)
        run = dataclasses.replace(composed.run, dir=options["run.dir"], name=options["run.name"])
        files = options["label.files"].strip("[]").split(",")
        return dataclasses.replace(
            composed, run=run, label=dataclasses.replace(composed.label, files=files)
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(config, "compose", quickly)
        yield


@pytest.mark.usefixtures("plain", "quick")
def test_labels(tmp_path: Path) -> None:
    seen.clear()
    fuzz_labels(tmp_path, FEW)
    assert sum(count for kind, count in seen.items() if kind.endswith("bad")) > FEW / 3


# ---- all of it ----


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("plain", "quick")
def test_hundreds(models: Models, tmp_path: Path) -> None:
    """What `make fuzz` runs."""
    seen.clear()
    for part, examples in (
        (fuzz_gguf, MANY),
        (fuzz_runs, 2 * MANY),
        (fuzz_registries, 3 * MANY),
        (fuzz_labels, MANY),
    ):
        (tmp_path / part.__name__).mkdir()
        part(tmp_path / part.__name__, examples)
    fuzz_models(models, MANY)
    bad = sum(count for kind, count in seen.items() if kind.endswith("bad"))
    print(
        f"\n{os.path.basename(__file__)}: {sum(seen.values())} inputs, {bad} of them bad; every "
        "bad one ended in an error of ours"
    )
    for kind, count in sorted(seen.items()):
        print(f"  {kind}: {count}")
    assert bad >= 5 * MANY
