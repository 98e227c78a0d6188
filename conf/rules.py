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


def vllm_lora_rank(rank: int, wished: int | None) -> int:
    """vLLM's max_lora_rank for an adapter of `rank`: `wished` (rollout.max_lora_rank), or the
    smallest that vLLM takes and that holds it.

    Raises ValueError, whose message names the option, where vLLM takes no such rank.
    """
    holding = [taken for taken in VLLM_LORA_RANKS if taken >= rank]
    if not holding:
        ranks = ", ".join(map(str, VLLM_LORA_RANKS))
        raise ValueError(
            f"adapter.rank={rank} is above every LoRA rank that vLLM takes ({ranks}). "
            "Lower adapter.rank, or set rollout.lora_sync=merged."
        )
    if wished is None:
        return holding[0]
    if wished not in holding:
        raise ValueError(
            f"rollout.max_lora_rank={wished}: with adapter.rank={rank} vLLM takes one of "
            f"{', '.join(map(str, holding))}. Set rollout.max_lora_rank={holding[0]}, or null."
        )
    return wished


def wants_shared_prompts(engine: EngineConfig, stage: OnlineStage) -> bool:
    """Whether the responses to a prompt are packed behind one copy of it, if the model can.

    A critic values each token by itself, and a single response shares its prompt with none.
    """
    if engine.share_prompts is False or stage.advantage is Advantage.gae:
        return False
    return stage.samples_per_prompt > 1
