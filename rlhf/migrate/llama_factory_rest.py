"""LLaMA-Factory's keys that have no option here, and why."""

from rlhf.migrate.tables import Key, above_one, idle, missing, stops
from rlhf.migrate.trainer import FUSED, INSIDE, LAUNCH, PARALLEL, WORKERS

VISION = "no such setting of pictures here, and neither video nor sound is read"

REST: tuple[Key, ...] = (
    *idle(LAUNCH, "ray_*", "master_addr", "master_port"),
    *idle(
        WORKERS,
        """
        preprocessing_* overwrite_cache streaming buffer_size tokenized_path
        data_shared_file_system use_fast_tokenizer cache_dir ignore_pad_token_for_loss
        mix_strategy
        """,
    ),
    *idle(
        "figures and curves are always kept",
        """
        plot_loss compute_accuracy include_effective_tokens_per_second print_param_status
        """,
    ),
    *idle(
        INSIDE,
        """
        use_reentrant_gc use_unsloth_gc low_cpu_mem_usage device_map offload_folder
        upcast_layernorm upcast_lmhead_output use_kv_cache infer_dtype
        quantization_device_map infer_backend do_sample reward_model_type quantization_type
        eval_on_each_dataset enable_torch_profiler profiler_* profile_modules
        """,
    ),
    *idle(
        "tokens of a hub are read from its own variables",
        "hf_hub_token",
        "ms_hub_token",
        "om_hub_token",
    ),
    *stops("an export in fewer bits by a calibration", "export_quantization_bit"),
    *idle("an export is made and checked on the CPU, in files of one size", "export_*"),
    *missing("held-out rows are a file: data.eval_path", "eval_dataset"),
    *missing(
        "rows of new tokens start at the mean of the others",
        """
        new_special_tokens_config init_special_tokens split_special_tokens
        """,
    ),
    *missing("only the last answer trains", "mask_history"),
    *missing("a template's own switch for thinking", "enable_thinking", "preserve_thinking"),
    *missing("tools are rendered by the model's own template", "tool_format"),
    *missing("weights of a mixture are those of data.sources", "interleave_probs"),
    *missing(
        "another adapter method",
        """
        use_llama_pro pissa_iter pissa_convert oft_rank module_dropout loraplus_lr_embedding
        freeze_extra_modules create_new_adapter mixture_of_depths
        """,
    ),
    *missing(
        "another loss",
        """
        use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha eaft_k
        dpo_label_smoothing pref_bco_weight moe_aux_loss_coef
        """,
    ),
    *missing("the reference is the start of the run", "ref_model", "ref_model_*"),
    *missing("reward models are directories that stage=reward wrote", "reward_model_*"),
    *missing("stage.optimizer has no such one", "use_adam_mini"),
    *missing(
        FUSED,
        """
        enable_liger_kernel use_unsloth use_v1_kernels block_diag_attn shift_attn
        """,
    ),
    *missing("training in 8-bit floats", "fp8", "fp8_*"),
    *missing("W&B and TensorBoard are the trackers", "use_swanlab", "swanlab_*"),
    *missing("the model's own context is used", "rope_scaling", "model_max_length"),
    *missing("sequences are not split over devices", "hyper_parallel_*", "use_hyper_parallel"),
    *above_one(
        PARALLEL,
        """
        tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
        context_parallel_size sequence_parallel virtual_pipeline_model_parallel_size
        """,
    ),
    *missing(
        "Megatron's own choice",
        """
        bias_activation_fusion apply_rope_fusion overlap_param_gather overlap_grad_reduce
        use_distributed_optimizer moe_grouped_gemm moe_token_dispatcher_type
        use_packed_sequences mixed_precision masked_softmax_fusion cross_entropy_loss_fusion
        calculate_per_token_loss extra_config
        """,
    ),
    *idle("part of recompute_granularity", "recompute_method", "recompute_num_layers"),
    *stops("Megatron's trainer", "use_mca", "use_megatron_bridge", "megatron_bridge_args"),
    *stops("experts on the CPU by KTransformers", "use_kt", "kt_*"),
    *stops(
        VISION,
        """
        image_* video_* freeze_vision_tower freeze_multi_modal_projector
        use_audio_in_video audio_sampling_rate crop_to_patches
        """,
    ),
    *stops("stage.train.modules=[tower,projector] leaves it out", "freeze_language_model"),
    *stops(
        "answers or scores without training",
        """
        do_predict predict_with_generate task task_dir n_shot lang save_dir
        """,
    ),
    *stops("a model with random weights", "train_from_scratch"),
    *stops(
        "the layout of their version 1",
        """
        model_class train_dataset dist_config.* kernel_config.* peft_config.* optim_config.*
        quant_config.*
        """,
    ),
)
