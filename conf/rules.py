"""What several options mean together: rules that more than one package follows. Standard library
only.
"""

from conf.choices import AdapterKind, Advantage, LoraSync
from conf.online import OnlineStage
from conf.schema import AdapterConfig, EngineConfig, RolloutConfig

# vllm.config.lora.MaxLoRARanks of vLLM 0.32, which takes 20 s to import
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def merges_lora(rollout: RolloutConfig, adapter: AdapterConfig) -> bool:
    """Whether the generator gets whole weights with the adapter merged in, not the adapter alone.

    ``rollout.lora_sync=auto`` merges DoRA only: generators apply plain LoRA.
    """
    if adapter.kind is AdapterKind.none:
        return False
    if rollout.lora_sync is LoraSync.auto:
        return adapter.dora
    return rollout.lora_sync is LoraSync.merged


def lora_ranks_that_hold(rank: int) -> tuple[int, ...]:
    """Values of ``rollout.max_lora_rank`` that vLLM takes and that hold an adapter of `rank`,
    the smallest first; none where the adapter is too large.
    """
    return tuple(allowed for allowed in VLLM_LORA_RANKS if allowed >= rank)


def wants_shared_prompts(engine: EngineConfig, stage: OnlineStage) -> bool:
    """Whether the responses to a prompt are packed behind one copy of it, if the model can.

    A critic values each token by itself, and a single response shares its prompt with none.
    """
    if engine.share_prompts is False or stage.advantage is Advantage.gae:
        return False
    return stage.samples_per_prompt > 1
