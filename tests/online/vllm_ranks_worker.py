"""Run by torchrun (tests/online/test_sync.py): an engine per rank beside the trainer's process
group; rank 0 prints what it saw as JSON.

argument: a model directory.
"""

import json
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout
from conf.choices import RolloutBackend
from conf.schema import Config, DataConfig, RolloutConfig
from conf.stages import OnlineStage
from policy.saving import full_weights
from rlhf.process import distributed
from rlhf.types import Prompt


def main() -> None:
    directory = sys.argv[1]
    distributed.initialise()
    distributed.set_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    settings = RolloutConfig(
        backend=RolloutBackend.vllm, max_response_length=10, kv_cache_gib=0.05, max_num_seqs=16
    )
    generator = rollout.make_generator(
        Config(stage=OnlineStage(), rollout=settings, data=DataConfig(max_prompt_length=30)),
        model_path=directory,
        tokenizer=AutoTokenizer.from_pretrained(directory),
        model_factory=lambda: model,
        adapter_rank=None,
    )
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    generator.sync(full_weights(model), 1)
    rank = distributed.rank()
    prompts = [
        Prompt(id=f"{rank}-{i}", text="", token_ids=(20 + rank, 30 + i, 40))
        for i in range(1 + 3 * rank)
    ]
    rollouts = generator.generate(prompts, seed=5)
    logprobs = generator.logprobs(range(40, 60))
    generator.close()
    seen = {
        "ranks": distributed.world_size(),
        "local_world_size": os.environ.get("LOCAL_WORLD_SIZE"),
        "preloaded": os.environ.get("LD_PRELOAD"),
        "responses": distributed.gather(len(rollouts)),
        "same_logprobs": len(set(distributed.gather(tuple(logprobs)))) == 1,
        "sum_after_close": distributed.all_sum([1.0 + rank])[0],
    }
    if distributed.is_main():
        print("SEEN " + json.dumps(seen))
    distributed.shutdown()


if __name__ == "__main__":
    main()
