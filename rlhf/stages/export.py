"""``stage=export``: a model for other programs. Adapters are merged in float32; what is written is
loaded again and asked before it counts (rlhf/export/).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conf.choices import Dtype
from conf.schema import Config, ModelConfig
from conf.stages import ExportStage, GGUFType
from policy.saving import replacing
from rlhf.checks import inputs
from rlhf.export import card, families, gguf_file, ollama
from rlhf.export.answers import QUESTIONS, Agreement, Answer, answers, compare
from rlhf.export.card import Source
from rlhf.export.families import Family
from rlhf.export.ollama import Template
from rlhf.export.vocabulary import Vocabulary, vocabulary_of
from rlhf.models.directories import Contents, check_native_taken, contents, readable
from rlhf.models.loading import load_causal_lm, load_tokenizer, resolve_dtype, write_whole
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.run.models import model_path
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.export")
GGUF_FOLDER, CARD = "gguf", "README.md"
_ASKED = len(QUESTIONS)
# Answers that have to be the model's own; exports in other formats only tell how many are.
_NEEDED = {"float32": _ASKED, "f32": _ASKED, "float16": _ASKED - 1, "f16": _ASKED - 1}


@dataclass(frozen=True, slots=True)
class _Gguf:
    """What GGUF files need beside the weights."""

    family: Family
    words: Vocabulary
    template: Template | None


def check(cfg: Config) -> list[str]:
    """The model is there, and can be written as it is asked for. Raises UserError."""
    stage = cfg.stage_as(ExportStage)
    distributed.require_one_process("stage=export", "Run it without torchrun.")
    model = _whole_precision(cfg.model, model_path(cfg.model, cfg.run))
    inputs.check_gguf_file(model)
    held = contents(str(model.path))
    check_native_taken(held, taken=False)
    tokenizer = load_tokenizer(model, cfg.data.chat_template)
    if stage.gguf:
        config = _config_of(model, held)
        plan = _gguf_plan(stage, config, _class_of(config), tokenizer, config.vocab_size)
        return [] if plan.template is None else list(plan.template.notes)
    return []


def _whole_precision(model: ModelConfig, path: str) -> ModelConfig:
    """The model, in float32: what merges exactly, and is rounded once."""
    return ModelConfig(
        path=path,
        gguf_file=model.gguf_file,
        dtype=Dtype.float32,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
    )


def _config_of(model: ModelConfig, held: Contents) -> Any:
    from transformers import AutoConfig

    extra = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    with readable(f"the model {held.path}: its configuration"):
        return AutoConfig.from_pretrained(
            held.weights, trust_remote_code=model.trust_remote_code, **extra
        )


def _class_of(config: Any) -> str:
    """The class by which transformers loads the model; a GGUF file names none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = list(getattr(config, "architectures", None) or [])
    return str(names[0] if names else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))


def _gguf_plan(stage: ExportStage, config: Any, name: str, tokenizer: Any, rows: int) -> _Gguf:
    """`name`: of the model's class. Raises UserError."""
    family = families.family_of(config, name)
    words = vocabulary_of(tokenizer, rows)
    template = None
    if stage.modelfile:
        template = ollama.template_of(tokenizer, adds_bos=words.adds_bos)
    return _Gguf(family, words, template)


def run(ctx: RunContext) -> None:
    """Merge, ask, write, load again and ask. Raises UserError where an export answers otherwise
    than it must, and leaves nothing of it then.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage_as(ExportStage)
    with ctx.closing():
        ctx.watchdog.phase("load")
        path = model_path(cfg.model, cfg.run)
        LOG.info("stage=export: the model is %s", path)
        ctx.add_parent("policy", path)
        given = _whole_precision(cfg.model, path)
        held = contents(path)
        tokenizer = load_tokenizer(given, cfg.data.chat_template)
        source = card.source_of(held, stage.license)
        job = _Job(stage, given, tokenizer, source, stage.title or cfg.run.name)
        agreements = job.write(ctx.dir, ctx.watchdog.phase)
        ctx.watchdog.phase("finish")
        for item in agreements:
            ctx.tracker.log(0, {f"export/{item.name}/same_answers": float(item.same)})
        figures = {
            item.name: f"{item.same} of {item.asked} answers the same" for item in agreements
        }
        files = {"gguf": ctx.dir / GGUF_FOLDER} if stage.gguf else {}
        ctx.finish(
            steps=0,
            metrics={f"{item.name}/same_answers": item.same for item in agreements},
            model="model" if stage.safetensors else None,
            figures=figures | {"licence": source.license_name or "not known"},
            files=files,
        )


class _Job:
    """One export: the model as it is, and the forms in which it is written."""

    def __init__(
        self, stage: ExportStage, given: ModelConfig, tokenizer: Any, source: Source, title: str
    ) -> None:
        self.stage, self.given, self.tokenizer = stage, given, tokenizer
        self.source, self.title = source, title
        self._own: list[Answer] = []
        self._notes: list[str] = []

    def write(self, folder: Path, phase: Any) -> list[Agreement]:
        """Write all forms below `folder`. Raises UserError."""
        model = load_causal_lm(self.given, self.tokenizer)
        phase("ask")
        self._own = answers(model, self.tokenizer, self.stage.answer_tokens)
        agreements = []
        # beside the model one more copy is in memory, of the form that was loaded again
        if self.stage.gguf:
            phase("write gguf")
            agreements += self._gguf(folder / GGUF_FOLDER, model)
        if self.stage.safetensors:
            phase("write safetensors")
            agreements.append(self._safetensors(folder / "model", model))
        return agreements

    def _asked_again(self, path: Path, model: ModelConfig, name: str) -> Agreement:
        """The answers of an export that was loaded again."""
        read = load_causal_lm(model, self.tokenizer)
        again = answers(read, self.tokenizer, self.stage.answer_tokens)
        agreement = compare(name, self._own, again, _NEEDED.get(name))
        self._judge(path, agreement)
        return agreement

    def _judge(self, path: Path, agreement: Agreement) -> None:
        shown = f"{agreement.name}: {agreement.same} of {agreement.asked} answers are the model's"
        if not agreement.passes:
            own, other = agreement.differing[0]
            raise UserError(
                f"stage=export: {path} was loaded again, and {shown}; {agreement.needed} have to "
                f"be. To {own.question!r} the model answers {own.text!r}, the export "
                f"{other.text!r}. Nothing of it is left."
            )
        LOG.info("%s", shown)
        if agreement.needed is None and agreement.share < self.stage.least_agreement:
            LOG.warning(
                "%s, fewer than stage.least_agreement=%g: read those in %s before you use it.",
                shown,
                self.stage.least_agreement,
                CARD,
            )

    # ---- forms ----

    def _safetensors(self, folder: Path, model: Any) -> Agreement:
        dtype = self._dtype()
        with replacing(folder) as side:
            model.to(dtype)
            model.config.dtype = dtype
            write_whole(model, self.tokenizer, side)
            name = str(dtype).removeprefix("torch.")
            read = ModelConfig(
                path=str(side),
                dtype=Dtype.float32,
                attn_implementation=self.given.attn_implementation,
                trust_remote_code=self.given.trust_remote_code,
            )
            agreement = self._asked_again(folder, read, name)
            self._card(side, [agreement])
        return agreement

    def _dtype(self) -> torch.dtype:
        """That of the safetensors; auto: that of the model's own files."""
        if self.stage.dtype is not Dtype.auto:
            return resolve_dtype(self.stage.dtype)
        held = contents(str(self.given.path))
        told = getattr(_config_of(self.given, held), "dtype", None)
        return told if isinstance(told, torch.dtype) else torch.float32

    def _gguf(self, folder: Path, model: Any) -> list[Agreement]:
        rows = int(model.get_input_embeddings().weight.shape[0])
        name = type(model).__name__
        plan = _gguf_plan(self.stage, model.config, name, self.tokenizer, rows)
        self._notes += [] if plan.template is None else plan.template.notes
        config = None
        unread = families.unread(model.config, plan.family)
        if unread:
            config = model.config
            names = ", ".join(unread)
            self._notes.append(f"transformers reads no {names} from GGUF files; llama.cpp does.")
        agreements = []
        with replacing(folder) as side:
            for kind in self.stage.gguf:
                path = side / f"{self.title}-{kind.value}.gguf"
                self._write_gguf(path, model, plan, kind)
                agreements.append(self._gguf_again(path, kind, config))
            self._card(side, agreements)
        return agreements

    def _write_gguf(self, path: Path, model: Any, plan: _Gguf, kind: GGUFType) -> None:
        name = self.source.license_name
        gguf_file.write_file(
            path, model, plan.family, plan.words, kind, title=self.title, license_name=name
        )
        gguf_file.check_vocabulary(path, self.tokenizer, plan.words, list(QUESTIONS))
        if plan.template is not None:
            text = ollama.modelfile(path.name, plan.template, name)
            path.with_name(f"Modelfile.{kind.value}").write_text(text, encoding="utf-8")

    def _gguf_again(self, path: Path, kind: GGUFType, config: Any) -> Agreement:
        read = gguf_file.read_file(path, config)
        gguf_file.round_inputs(read, kind)
        again = answers(read, self.tokenizer, self.stage.answer_tokens)
        agreement = compare(kind.value, self._own, again, _NEEDED.get(kind.value))
        self._judge(path, agreement)
        return agreement

    def _card(self, folder: Path, agreements: Sequence[Agreement]) -> None:
        text = card.card(self.title, self.source, agreements, self._notes)
        (folder / CARD).write_text(text, encoding="utf-8")
