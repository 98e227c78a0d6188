"""axolotl's keys that have no option here, and why."""

from rlhf.migrate.tables import Key, above_one, idle, missing, stops
from rlhf.migrate.trainer import DISPLAY, FUSED, HUB, INSIDE, LAUNCH, PARALLEL, WORKERS

REST: tuple[Key, ...] = (
    *idle("a file's kind is told by its name", "datasets[].ds_type"),
    *idle(
        "answers train, or with stage.completion_only=false everything",
        "datasets[].roles_to_train",
        "datasets[].train_on_eos",
        "datasets[].train_on_eot",
    ),
    *idle(
        "system, user and assistant, and what formats call them",
        "datasets[].roles",
        "datasets[].chat_template",
    ),
    *missing(
        "no counterpart for a data set's own field",
        """
        datasets[].* pretraining_dataset[].* test_datasets test_datasets[].*
        """,
    ),
    *idle("held-out rows are packed as those that train", "eval_sample_packing"),
    *idle(
        "rows are packed as they come",
        """
        sample_packing_* multipack_* group_by_length pad_to_sequence_len
        pretrain_multipack_* min_sample_len streaming_multipack_*
        """,
    ),
    *idle("held-out rows are evaluated in micro-batches like those that train", "eval_batch_size"),
    *idle("ZeRO sets it inside", "fsdp_config.*", "fsdp_final_state_dict_type"),
    *missing("a group of replicas", "dp_replicate_size"),
    *idle("a server is started by stage=serve_rollout", "vllm.*"),
    *idle(
        DISPLAY,
        """
        wandb_watch eval_table_size logging_strategy debug eval_max_new_tokens
        include_tokens_per_second
        """,
    ),
    *missing(
        "W&B and TensorBoard are the trackers",
        """
        trackio_* use_trackio mlflow_* comet_* use_swanlab swanlab_* otel_* use_otel_metrics
        """,
    ),
    *idle("part of loss_watchdog_threshold", "loss_watchdog_patience"),
    *idle(
        WORKERS,
        """
        dataset_prepared_path dataset_processes dataset_num_proc dataloader_*
        remove_unused_columns strict skip_prepare_dataset shuffle_merged_datasets streaming
        total_num_tokens dataset_keep_in_memory accelerator_config accelerator_config.*
        experimental_skip_move_to_device excess_length_strategy curriculum_sampling
        tokenizer_legacy tokenizer_use_fast
        """,
    ),
    *idle(
        HUB,
        """
        hub_* push_dataset_to_hub hf_use_auth_token model_type tokenizer_type processor_type
        tokenizer_config base_model_config base_model_ignore_patterns
        """,
    ),
    *idle(
        LAUNCH,
        """
        ddp* local_rank device_map device_map.* use_ray ray_*
        """,
    ),
    *idle(
        INSIDE,
        """
        tf32 gradient_checkpointing_kwargs gradient_checkpointing_kwargs.* torchdistx_path
        low_cpu_mem_usage full_finetune flex_attn_* tokenizer_use_mistral_common
        lora_fan_in_fan_out ebft
        """,
    ),
    *idle("the stage says it", "peft", "trl", "vllm"),
    *idle("weights are always safetensors", "save_safetensors"),
    *idle(
        "a tokenizer without a pad token pads with its end",
        "special_tokens.pad_token",
        "tokens.pad_token",
    ),
    *idle(
        "special tokens of the model's own vocabulary stay as they are",
        "special_tokens.unk_token",
        "tokens.unk_token",
    ),
    *missing(
        "special tokens are the model's",
        """
        special_tokens.* special_tokens tokens.* eot_tokens added_tokens_overrides
        resize_token_embeddings_to_32x
        """,
    ),
    *missing(
        "stage.optimizer has no such one",
        """
        galore_* lisa_* optim_args optim_target_* muon_*
        """,
    ),
    *missing(
        FUSED,
        """
        plugins liger_* lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel
        cut_cross_entropy use_kernels use_scattermoe use_sonicmoe fused_attn_kernel
        flash_attn_* flash_optimum torch_compile* experts_implementation unsloth_*
        use_glm_dsa_kernels use_dsv4_kernels dsv4_* tiled_mlp chunked_cross_entropy gemma4_*
        s2_attention xformers_attention moe_kernels
        """,
    ),
    *above_one(
        PARALLEL,
        """
        tensor_parallel_size         expert_parallel_* ring_attn_func heads_k_stride
        """,
    ),
    *missing("activations that are kept elsewhere", "activation_offloading", "offload_*"),
    *missing(
        "training in few bits",
        """
        fp8 fp8_* qat qat.* nvfp4_* use_onebitllms
        """,
    ),
    *missing(
        "a base that is rounded by another library than bitsandbytes",
        """
        gptq gptq_* model_quantization_config model_quantization_config_kwargs
        model_quantization_config_kwargs.* quantize_moe_experts llmcompressor
        llmcompressor.* bnb_config_kwargs bnb_config_kwargs.*
        """,
    ),
    *missing(
        "another adapter method",
        """
        peft.* lora_target_parameters peft_* relora* loraplus_lr_embedding lora_task_type
        reinit_weights jagged_restart_*
        """,
    ),
    *missing(
        "a schedule of theirs",
        """
        cosine_constant_lr_ratio lr_quadratic_warmup eta_min lr_groups embedding_lr*
        """,
    ),
    *missing(
        "experts' own options",
        """
        model_config model_config.* overrides_of_model_config* llama4_linearized_experts
        router_*
        """,
    ),
    *missing("another loss", "use_eaft", "eaft_*"),
    *missing(
        "an evaluation by answers beside training",
        "do_causal_lm_eval",
        "eval_causal_lm_metrics",
        "do_bench_eval",
    ),
    *missing("weights of a model before its training", "init_*"),
    *missing("the model's own context is used", "rope_scaling", "overrides_of_model_kwargs"),
    *missing("no counterpart in the online loop", "trl.*"),
    *stops("diffusion language models", "diffusion", "diffusion.*"),
    *stops("energy-based fine-tuning", "ebft.*"),
    *stops("no such setting of pictures here", "freeze_mm_modules", "image_size", "image_resize_*"),
    *stops("classification heads", "cls_model_config", "process_reward_model"),
    *idle("a reward model has one score", "num_labels"),
)
