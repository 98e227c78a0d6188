"""OpenRLHF's keys that have no option here, and why."""

from rlhf.migrate.tables import Key, above_one, idle, missing, stops
from rlhf.migrate.trainer import FUSED, HUB, INSIDE, LAUNCH, PARALLEL, WORKERS

REST: tuple[Key, ...] = (
    *idle(
        "engine.micro_tokens bounds every micro-batch",
        "train.dynamic_batch_enable",
        "rollout.max_tokens_per_gpu",
        "rollout.vllm_generate_batch_size",
    ),
    *idle("part of the data sets", "data.dataset_probs", "data.prompt_probs"),
    *idle(
        "prompts of a chat are rendered by the model's template, texts are not",
        "data.apply_chat_template",
        "data.multiturn",
    ),
    *missing("texts around a prompt", "data.input_template"),
    *idle("groups whose scores differ are kept, whatever they are", "algo.dynamic_filtering_range"),
    *idle(
        "checkpoints are in the run's directory",
        """
        ckpt.path ckpt.max_mem ckpt.disable_ds ds.use_universal_ckpt
        """,
    ),
    *idle("a run's model is in Hugging Face's layout", "ckpt.save_hf"),
    *idle("the best weights by the held-out loss are kept", "ckpt.best_metric_key"),
    *idle(
        "each device trains, scores and generates",
        """
        ref.num_* reward.num_* critic.num_* train.colocate_* ds.enable_sleep vllm.sync_*
        vllm.enable_prefix_caching
        """,
    ),
    *idle(
        LAUNCH,
        """
        local_rank nproc_per_node nnodes master_* node_rank hostfile
        """,
    ),
    *idle(WORKERS, "data.disable_fast_tokenizer", "data.dataloader_num_workers"),
    *idle(HUB, "use_ms"),
    *idle(
        INSIDE,
        """
        ds.zpg ds.overlap_comm ds.grad_accum_dtype ds.deepcompile
        model.gradient_checkpointing_reentrant actor.gradient_checkpointing_reentrant
        train.full_determinism_enable model.compute_fp32_loss_enable ds.value_head_prefix
        critic.save_value_network
        """,
    ),
    *missing(FUSED, "ds.use_liger_kernel", "ds.experts_implementation"),
    *above_one(PARALLEL, "ds.tensor_parallel_size", "ds.ring_attn_head_stride"),
    *missing("experts' own loss", "model.aux_loss_coef", "actor.aux_loss_coef"),
    *missing("stage.optimizer has no such one", "muon.*"),
    *missing("the reference is the start of the run", "ref.model_name_or_path", "ref.offload"),
    *missing("the critic starts from the reward model or the policy", "critic.model_name_or_path"),
    *missing("models wait on the device, or by rollout.sleep", "reward.offload"),
    *missing("no such penalty", "reward.stop_properly_penalty_coef"),
    *missing("averaged weights", "train.enable_ema", "train.ema_beta"),
    *missing("an agent's own code: environment=python takes a class", "train.agent_func_path"),
    *missing("held-out prompts are scored as those that train", "eval.*"),
    *missing("loss", "model.loss_type"),
    *stops("pre-training on whole texts needs rows of texts", "model.pretrain_mode_enable"),
    *stops(
        "no such setting of pictures here: columns are found by their names",
        "data.image_key",
        "data.max_images_per_prompt",
        "actor.freeze_visual_encoder",
    ),
)
