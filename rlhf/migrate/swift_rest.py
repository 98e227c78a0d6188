"""ms-swift's keys that have no option here, and why."""

from rlhf.migrate.tables import Key, above_one, idle, missing, stops
from rlhf.migrate.trainer import FUSED, HUB, INSIDE, LAUNCH, PARALLEL, WORKERS

REST: tuple[Key, ...] = (
    *idle("nf4 with the weights' own format to compute in", "bnb_4bit_*"),
    *idle("part of recompute_granularity", "recompute_*"),
    *idle(
        WORKERS,
        """
        dataset_num_proc load_from_cache_file streaming shuffle_buffer_size load_data_args
        cached_dataset cached_val_dataset lazy_tokenize to_cached_dataset write_batch_size
        strict custom_register_path dataset_shuffle use_hf train_dataloader_shuffle
        eval_iters interleave_prob stopping_strategy
        """,
    ),
    *idle(
        HUB,
        """
        model_type model_name model_author check_model create_checkpoint_symlink add_version
        hub_*
        """,
    ),
    *idle(
        LAUNCH,
        """
        ddp_backend device_map use_ray ray_* hostfile
        node_rank nproc_per_node nnodes master_port master_addr machine_rank
        tuner_backend
        """,
    ),
    *idle(
        INSIDE,
        """
        finetune no_save_optim no_save_rng no_load_* mcore_model mcore_adapter to_mcore
        to_hf test_convert_precision masked_softmax_fusion cross_entropy_loss_fusion
        cross_entropy_fusion_impl gradient_accumulation_fusion offload_bridge model_kwargs
        template_backend config config_file acc_strategy deterministic_* overlap_*
        linear_decoupled_in_proj vllm_enable_lora vllm_max_lora_rank
        vllm_server_pass_dataset
        """,
    ),
    *idle(
        "where the weights wait is decided by rollout.sleep",
        """
        offload_model offload_optimizer move_model_batches async_generate
        offload_teacher_model
        """,
    ),
    *missing("answers end with the model's own end tokens", "stop_words"),
    *missing("the reference is the start of the run", "ref_model", "ref_*"),
    *missing(
        "the model's own chat template is used",
        """
        template use_chat_template template_mode agent_template response_prefix
        add_non_thinking_prefix enable_thinking
        """,
    ),
    *missing(
        "rewards from a plugin: give pkg.module:function in reward.function or reward.terms",
        """
        external_plugins reward_model_plugin cosine_* repetition_* soft_cache_length
        soft_max_length
        """,
    ),
    *idle("transformers' own is taken", "neftune_backend"),
    *missing(
        "stage.optimizer has no such one",
        """
        use_galore galore_* lisa_* optim_args
        """,
    ),
    *missing(
        "another adapter method",
        """
        init_weights lora_ga_* reft_* llamapro_* lora_bias freeze_*_ratio boft_* fourier_*
        adalora_* vera_* lora_dtype use_swift_lora target_regex trainable_parameters*
        freeze_parameters*
        """,
    ),
    *missing(
        "gradients, logits or activations that are kept elsewhere",
        """
        use_logits_to_keep use_precision_aware_optimizer optimizer_cpu_offload
        optimizer_offload_fraction exp_avg_dtype exp_avg_sq_dtype
        """,
    ),
    *missing(
        "another loss",
        """
        enable_dft_loss enable_channel_loss sft_alpha tau_pos tau_neg fipo_*
        log_rollout_offpolicy_metrics
        """,
    ),
    *missing(
        "rewards and rollouts of several turns: environment=... has them",
        """
        multi_turn_scheduler max_turns use_gym_env gym_env vllm_use_async_engine
        """,
    ),
    *above_one(
        PARALLEL,
        """
        sequence_parallel tensor_model_parallel_size
        pipeline_model_parallel_size expert_model_parallel_size
        expert_tensor_parallel_size decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers
        """,
    ),
    *missing(
        "experts' own options",
        """
        moe_* router_aux_loss_coef experts_impl mtp_*
        """,
    ),
    *missing("training in 8-bit floats", "fp8_*"),
    *missing("the model's own context is used", "rope_scaling", "packing_length"),
    *missing(FUSED, "attn_impl_*"),
    *missing(
        "a length-limited evaluation beside training",
        """
        eval_use_evalscope eval_dataset eval_dataset_args eval_limit eval_generation_config
        """,
    ),
    *missing("supervised and online training in one", "chord_*"),
    *missing("speculative decoding", "vllm_speculative_config", "sglang_*"),
    *stops(
        "distillation from a teacher",
        """
        teacher_* lmbda gkd_* seq_kd
        """,
    ),
    *stops(
        "no such setting of pictures here, and neither video nor sound is read",
        """
        freeze_vit freeze_aligner freeze_llm vit_* aligner_lr max_pixels
        vllm_limit_mm_per_prompt lmdeploy_vision_*
        """,
    ),
    *stops("classification heads", "num_labels", "problem_type"),
    *stops(
        "answers or servers without training",
        """
        stream infer_backend max_batch_size host port served_model_name result_path
        eval_backend lang base_url predict_with_generate metric sglang_tp_size lmdeploy_tp
        eval_url
        """,
    ),
    *stops(
        "an export in fewer bits",
        """
        quant_batch_size quant_n_samples to_ollama push_dataset_to_hub export_*
        """,
    ),
    *stops(
        "Ray groups with settings of their own",
        """
        train.* rollout.* colocate_groups device_groups.*
        """,
    ),
    *stops(
        "answers that are sampled and scored, without training",
        """
        num_return_sequences sampler_engine orm_model prm_model prm_threshold
        num_sampling_batch_size override_exist_file load_args output_file
        """,
    ),
)
