"""Worker: TRL's GRPOTrainer, one step per request (`python -m benchmarks.speed.trl_peer CASE READ
WRITE`).

Its vLLM mode needs CUDA, so on a CPU it generates with transformers. Everything else is as its
configuration allows to match ours: float32, the same sampling, one optimizer step per rollout, no
KL penalty, the GRPO loss and the same AdamW.
"""

import os
import queue
import sys
import tempfile
import threading
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.speed.cases import Case, distinct_words
from benchmarks.speed.protocol import Figures, serve
from rlhf.process import distributed


class Timed:
    """Seconds spent inside a method of an object, summed until `take`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds = 0.0
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(owner, name, call)

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class TurnTaking(TrainerCallback):
    """Holds the trainer at the start of each step until it is asked for one."""

    def __init__(self) -> None:
        self.go: queue.Queue[None] = queue.Queue()
        self.done: queue.Queue[float] = queue.Queue()
        self.loaded = threading.Event()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loaded.set()
        self.go.get()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done.put(time.perf_counter() - self.began)


def make_trainer(case: Case, turns: TurnTaking) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    rows = len(case.prompts) * case.samples
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-trl-"),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=min(case.micro_batch, rows),
        gradient_accumulation_steps=max(1, rows // case.micro_batch),
        num_generations=case.samples,
        max_completion_length=case.max_response,
        max_steps=10_000,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        num_iterations=1,
        loss_type="grpo",
        scale_rewards="group",
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    peft_config = None
    if case.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=case.rank,
            lora_alpha=2 * case.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(case.model),
        reward_funcs=distinct_words,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in case.prompts]),
        peft_config=peft_config,
        callbacks=[turns],
    )


def main() -> None:
    case = Case.load(sys.argv[1])
    distributed.set_threads()
    turns = TurnTaking()
    trainer = make_trainer(case, turns)
    written: list[float] = []
    inner = trainer._generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        written.append(float(sum(len(ids) for ids in out[1])))
        return out

    trainer._generate = generate
    generating, making = (
        Timed(trainer, "_generate"),
        Timed(trainer, "_generate_and_score_completions"),
    )

    def step() -> Figures:
        turns.go.put(None)
        seconds = turns.done.get()
        rollout, made = generating.take(), making.take()
        tokens = sum(written)
        written.clear()
        return {
            "step_s": seconds,
            "rollout_s": rollout,
            "update_s": seconds - made,
            "response_tokens": tokens,
        }

    def answer() -> None:
        turns.loaded.wait()
        serve(step)
        os._exit(0)  # the trainer waits in its main thread for a turn that will not come

    threading.Thread(target=answer, daemon=True).start()
    trainer.train()


if __name__ == "__main__":
    main()
