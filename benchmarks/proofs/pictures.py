"""The proof of pictures: a tiny model that reads pictures, from scratch, says how many shapes of
which colour and form it is shown: SFT, then GRPO with a verifier.

python -m benchmarks.proofs.pictures --seeds 0 1 2     runs and checks
python -m benchmarks.proofs.pictures --check-only      checks the runs that are there
python -m benchmarks.proofs.pictures rollout=vllm      further options of all online runs

Pictures, rows and the model are made by this program. The demonstrations are by a careless hand:
where a picture has more than two shapes, it often counts one too few. SFT copies that; an answer
that is sampled several times is then right now and then, which a verifier can tell.

Two controls show that what GRPO adds is seen in the pictures: the same evaluation with the
pictures exchanged among the rows, and the same GRPO on prompts with exchanged pictures. The runs
lie in <runs>/proof-pictures-<seed>/<run>.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.proofs.common import Check, MissingRun, read_run, report
from benchmarks.shared import exit_code, module, write_rows

LEAST_RISE = 0.20  # of the share of held-out pictures that are told rightly
VANISHED = 0.05  # of the same share, where the pictures say nothing
MAX_WALL_S = 15 * 60  # of a seed's SFT, GRPO and evaluation
SIDE = 32  # pixels of a picture
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
    "purple": (150, 60, 180),
    "white": (245, 245, 245),
}
FORMS = ("circle", "square", "triangle", "cross")
COUNTS = ("one", "two", "three", "four")
QUESTION = ("what", "is", "shown")
CARELESS = 0.7  # share of the demonstrations with more than two shapes that count one too few
DEMONSTRATIONS, PROMPTS, HELD_OUT = 3000, 3000, 256
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %} {{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Row = dict[str, Any]
Scene = tuple[int, str, str]  # how many shapes, of which colour and form


# ---- pictures ----


def drawn(scene: Scene, rng: random.Random) -> Any:
    """A picture of the scene; place and size of each shape are random."""
    from PIL import Image, ImageDraw

    count, colour, form = scene
    image = Image.new("RGB", (SIDE, SIDE), (rng.randint(0, 30),) * 3)
    draw, cell = ImageDraw.Draw(image), SIDE // 2
    for place in rng.sample(range(4), count):
        radius = rng.uniform(0.3, 0.42) * cell
        room = cell / 2 - radius
        x = place % 2 * cell + cell / 2 + rng.uniform(-room, room)
        y = place // 2 * cell + cell / 2 + rng.uniform(-room, room)
        _shape(draw, form, (x, y), radius, COLOURS[colour])
    return image


def _shape(
    draw: Any, form: str, centre: tuple[float, float], radius: float, fill: tuple[int, int, int]
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if form == "circle":
        draw.ellipse(box, fill=fill)
    elif form == "square":
        draw.rectangle(box, fill=fill)
    elif form == "triangle":
        corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
        draw.polygon(corners, fill=fill)
    else:
        arm = radius / 3
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)


def told(scene: Scene) -> str:
    """The scene in words."""
    count, colour, form = scene
    return f"{COUNTS[count - 1]} {colour} {form}"


def demonstrated(scene: Scene, rng: random.Random) -> str:
    """What the careless hand says of it."""
    count, colour, form = scene
    if count > 2 and rng.random() < CARELESS:
        return told((count - 1, colour, form))
    return told(scene)


def shown(folder: Path, name: str, number: int, rng: random.Random) -> list[tuple[str, Scene]]:
    """New pictures in `folder`/images, and what is on them."""
    place = folder / "images"
    place.mkdir(parents=True, exist_ok=True)
    out = []
    for index in range(number):
        scene = (rng.randint(1, 4), rng.choice(list(COLOURS)), rng.choice(FORMS))
        file = f"images/{name}-{index}.png"
        drawn(scene, rng).save(folder / file)
        out.append((file, scene))
    return out


def asked(file: str) -> Row:
    question = {"role": "user", "content": f"<image>{' '.join(QUESTION)}"}
    return {"prompt": [question], "images": [file]}


def write(folder: Path, seed: int) -> None:
    """The files of rows: demonstrations, prompts with what is right, and both of the latter with
    the pictures exchanged.
    """
    rng = random.Random(f"{seed}:pictures")
    for name, number in (("sft", DEMONSTRATIONS), ("sft_eval", HELD_OUT)):
        rows = []
        for file, scene in shown(folder, name, number, rng):
            answer = {"role": "assistant", "content": demonstrated(scene, rng)}
            rows.append(asked(file) | {"completion": [answer]})
        write_rows(folder / f"{name}.jsonl", rows)
    for name, number in (("prompts", PROMPTS), ("prompts_eval", HELD_OUT)):
        pairs = shown(folder, name, number, rng)
        files = [file for file, _ in pairs]
        rows = [asked(file) | {"answer": told(scene)} for file, scene in pairs]
        write_rows(folder / f"{name}.jsonl", rows)
        rng.shuffle(files)
        exchanged = [row | {"images": [file]} for row, file in zip(rows, files, strict=True)]
        write_rows(folder / f"{name}_exchanged.jsonl", exchanged)


# ---- the model ----


def tokenizer_of_words() -> Any:
    """Every word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<image>"]
    special += ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    words = [*special, *COUNTS, *COLOURS, *FORMS, *QUESTION]
    numbered = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        model_max_length=64,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(folder: Path, seed: int) -> None:
    """An Idefics3 of half a million random parameters, with its tokenizer and processor: 64 patches
    of a picture become 16 tokens.
    """
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    torch.manual_seed(seed)
    tokenizer, edge = tokenizer_of_words(), {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    patch, together = 4, 2
    each = (SIDE // patch // together) ** 2
    processor = Idefics3Processor(images, tokenizer, image_seq_len=each, chat_template=TEMPLATE)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 64, "intermediate_size": 256, "image_size": SIDE, "patch_size": patch}
    text = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Idefics3Config(
        vision_config={**vision, **heads},
        text_config={
            **text,
            **heads,
            **ids,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "bos_token_id": None,
        },
        scale_factor=together,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


# ---- runs ----

_SFT = ("stage.steps=320", "stage.batch_size=32", "stage.learning_rate=1e-3", "stage.max_length=48")
_GRPO = (
    "stage.steps=30",
    "stage.prompts_per_step=32",
    "stage.samples_per_prompt=8",
    "stage.learning_rate=3e-4",
    "stage.kl_coef=0.0",
)
_REWARD = "+reward.terms.right.kind=exact"


@dataclass(frozen=True, slots=True)
class ProofRuns:
    """Where the runs of one seed lie, and their commands."""

    runs: Path
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return self.runs / f"proof-pictures-{self.seed}"

    def command(self, stage: str, name: str, *options: str) -> list[str]:
        shared = [f"run.seed={self.seed}", f"run.dir={self.root}", "run.overwrite=true"]
        shared += [f"run.name={name}", "tracking=none", "engine.threads=1"]
        return module("rlhf", f"stage={stage}", *shared, *options)

    def online(self, stage: str, name: str, *options: str) -> list[str]:
        lengths = ("data.max_prompt_length=32", "rollout.max_response_length=6")
        common = ("rollout=hf", _REWARD, *lengths)
        return self.command(stage, name, *common, *options, *self.overrides)

    def commands(self) -> Iterator[list[str]]:
        """SFT; GRPO and its evaluations; GRPO on exchanged pictures and its evaluation."""
        data = self.root / "data"
        taught = [f"model.path={data}/model", f"data.path={data}/sft.jsonl"]
        yield self.command("sft", "sft", *taught, f"data.eval_path={data}/sft_eval.jsonl", *_SFT)
        start = f"{self.root}/sft/sft/model"
        judged = (f"stage.before={start}", f"stage.prompts={HELD_OUT}", "stage.greedy=true")
        for name, file in (("grpo", "prompts"), ("exchanged", "prompts_exchanged")):
            rows = f"data.path={data}/{file}.jsonl"
            yield self.online("grpo", name, f"model.path={start}", rows, *_GRPO)
            after = f"stage.after={self.root}/{name}/grpo/model"
            held = f"data.eval_path={data}/prompts_eval.jsonl"
            yield self.online("eval", name, *judged, after, held)
        after = f"stage.after={self.root}/grpo/grpo/model"
        held = f"data.eval_path={data}/prompts_eval_exchanged.jsonl"
        yield self.online("eval", "unseen", *judged, after, held)

    def checks(self) -> list[Check]:
        """The bounds on all runs. Raises MissingRun."""
        sft, online = read_run(self.root / "sft/sft"), read_run(self.root / "grpo/grpo")
        evaluation = read_run(self.root / "grpo/eval")
        wall = sum(float(run.summary["wall_s"]) for run in (sft, online, evaluation))
        before = evaluation.metric("eval/score_before")
        after = evaluation.metric("eval/score_after")
        unseen, exchanged = (
            read_run(self.root / f"{name}/eval") for name in ("unseen", "exchanged")
        )
        gap = max(online.series("rollout/logprob_gap"))
        return [
            Check("exact match on held-out pictures before GRPO", before, high=1.0 - LEAST_RISE),
            Check("exact match on held-out pictures after GRPO", after, low=LEAST_RISE),
            Check("its rise", after - before, low=LEAST_RISE),
            Check(
                "its rise where the evaluated pictures are exchanged",
                unseen.metric("eval/score_delta"),
                high=VANISHED,
            ),
            Check(
                "its rise where GRPO's pictures were exchanged",
                exchanged.metric("eval/score_delta"),
                high=VANISHED,
            ),
            Check("SFT, GRPO and their evaluation, s", wall, high=MAX_WALL_S),
            Check("largest rollout/logprob_gap, nats", gap, high=1e-3, strict=True),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--check-only", action="store_true", help="run nothing")
    options, overrides = parser.parse_known_args(arguments)
    passed = True
    for seed in options.seeds:
        plan = ProofRuns(options.runs.resolve(), seed, tuple(overrides))
        if not options.check_only:
            write(plan.root / "data", seed)
            build_model(plan.root / "data" / "model", seed)
            if any(exit_code(command) for command in plan.commands()):
                print(f"seed {seed}: a command failed", file=sys.stderr)
                passed = False
                continue
        try:
            passed &= report(f"pictures, seed {seed}", plan.checks())
        except MissingRun as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            passed = False
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
