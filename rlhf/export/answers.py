"""Twenty questions that a model answers before its export and after it was loaded again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.models.encoding import prompt_ids
from rlhf.models.turns import end_ids, response_text
from rlhf.types import Message

QUESTIONS = (
    "What is the capital of France?",
    "How many legs does a spider have?",
    "Write a sentence about the sea.",
    "Why is the sky blue?",
    "Name three fruits.",
    "What is 17 + 25?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a short recipe for pancakes.",
    "What does a carpenter do?",
    "Is 91 a prime number?",
    "Describe a cat to someone who has never seen one.",
    "What is the opposite of 'ancient'?",
    "Write a Python function that adds two numbers.",
    "Which planet is the largest?",
    "Explain what a mortgage is.",
    "Tell me a joke about computers.",
    "How do I boil an egg?",
    "List the days of the week.",
    "What should I do when I can't sleep?",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote to a question."""

    question: str
    token_ids: tuple[int, ...]
    text: str


@torch.no_grad()
def answers(model: Any, tokenizer: Any, longest: int) -> list[Answer]:
    """The most likely answers, of at most `longest` tokens: one question at a time, so that no
    padding can change one.
    """
    chat = tokenizer.chat_template is not None
    out = []
    model.eval()
    for question in QUESTIONS:
        message: Message = {"role": "user", "content": question}
        ids = prompt_ids(tokenizer, [message] if chat else question)
        written = most_likely(model, tokenizer, ids, longest)
        out.append(Answer(question, written, response_text(tokenizer, written, chat=chat)))
    return out


@torch.no_grad()
def most_likely(model: Any, tokenizer: Any, ids: Sequence[int], longest: int) -> tuple[int, ...]:
    """What the model writes behind the tokens `ids`, the most likely token each time, with the one
    that ends it.
    """
    ends = list(end_ids(tokenizer))
    written: list[int] = []
    cache, given = None, list(ids)
    while len(written) < longest:
        out = model(
            input_ids=torch.tensor([given], device=model.device),
            past_key_values=cache,
            use_cache=True,
        )
        token = int(out.logits[0, -1].argmax())
        written.append(token)
        if token in ends:
            break
        cache, given = out.past_key_values, [token]
    return tuple(written)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many answers of an export are those of the model that it was made from."""

    name: str  # of the export
    same: int
    asked: int
    needed: int | None  # None: only told
    differing: tuple[tuple[Answer, Answer], ...]  # the model's, the export's

    @property
    def share(self) -> float:
        return self.same / self.asked

    @property
    def passes(self) -> bool:
        return self.needed is None or self.same >= self.needed


def compare(
    name: str, own: Sequence[Answer], exported: Sequence[Answer], needed: int | None
) -> Agreement:
    """Token by token. Answers are in the same order."""
    pairs = list(zip(own, exported, strict=True))
    differing = tuple((a, b) for a, b in pairs if a.token_ids != b.token_ids)
    return Agreement(name, len(pairs) - len(differing), len(pairs), needed, differing)
