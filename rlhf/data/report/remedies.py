"""Which option mends what a check finds. Steps are those of data.pipeline (conf/preparation/); a test holds every name against them.

What stands in backticks is to be typed: an option, or an entry of data.pipeline.
"""

REMEDIES: dict[str, str] = {
    "truncated": "a larger `stage.max_length` (set data.report_limit to it), or `{step: length, unit: tokens, tokenizer: MODEL, high: 1024}`",
    "exact_duplicates": "`{step: exact_duplicates}`",
    "near_duplicates": "`{step: near_duplicates}`",
    "row_leakage_exact": "`{step: split}`, which keeps the rows of one cluster on one side, instead of a data.eval_path of its own",
    "row_leakage_near": "`{step: split}`, which keeps the rows of one cluster on one side, instead of a data.eval_path of its own",
    "prompt_leakage_exact": "`{step: split}`, which keeps the rows of one cluster of prompts on one side",
    "prompt_leakage_near": "`{step: split}`, which keeps the rows of one cluster of prompts on one side",
    "languages": "`{step: language, keep: [en]}`",
    "imbalance": "`{step: balance}`; or, for stage=kto, stage.desirable_weight and stage.undesirable_weight",
    "one_class": "more rows of the other class: nothing can be learned from one",
    "one_cluster": "`{step: balance}` by clusters",
    "equal_sides": "`{step: equal_sides}`",
    "contradictions": "`{step: aggregate}` where several annotators judged, else `{step: review}`",
    "length_bias": "pairs of sides about equally long, or a length term beside the reward (reward.terms, kind length)",
    "role_order": "mend the conversations at their source",
    "empty_turns": "`{step: length, low: 1}`",
    "wrong_end": "mend the conversations at their source, or read them as prompts (data.format=prompt)",
    "template_markers": "give the texts without their markers: the tokenizer's chat template adds them",
    "double_bos": "take the beginning-of-sequence token out of the texts, or out of the chat template (data.chat_template)",
    "double_eos": "take the end-of-sequence token out of the texts, or out of the chat template (data.chat_template)",
    "unrendered": "another chat template (data.chat_template), or conversations in the order that this one asks for",
    "html": "`{step: repair, html: true}`",
    "encoding": "`{step: repair}`",
    "garbled": "`{step: quality}`",
    "repetition": "`{step: quality}`",
    "disagreement": "`{step: review}` for a person to decide, or `{step: aggregate, method: dawid_skene}`",
    "wrong_labels": "`{step: review}`, and a word with the annotators",
    "suspect_labels": "`{step: label_noise}` with the run's own reward model",
    "standard_accuracy": "gold items with the column `gold`; `{step: review}` where the labels fall short",
    "standard_kappa": "several annotators (column `annotator`) on some of the items; clearer instructions where they differ",
    "standard_rows": "more rows, or an easier task",
}
