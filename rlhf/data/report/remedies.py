"""Which option repairs what a check reports. Steps are those of data.pipeline (conf/preparation/);
a test compares every name with them.

What stands in backticks is to be typed: an option, or an entry of data.pipeline. Capitals stand for
what the user fills in.
"""

_ACROSS = "one file and `{step: split}`, which keeps near-duplicates on one side"

REMEDIES: dict[str, str] = {
    "truncated": "a larger `stage.max_length` (set `data.report_limit` to it), or `{step: "
    "length, unit: tokens, tokenizer: MODEL, high: LIMIT}`",
    "exact_duplicates": "`{step: exact_duplicates}`",
    "near_duplicates": "`{step: near_duplicates}`",
    "row_leakage_exact": f"`{{step: near_duplicates}}`, which of equal and of similar rows keeps "
    f"the held-out one; or {_ACROSS}",
    "row_leakage_near": f"`{{step: near_duplicates}}`, which of equal and of similar rows keeps "
    f"the held-out one; or {_ACROSS}",
    "prompt_leakage_exact": _ACROSS,
    "prompt_leakage_near": _ACROSS,
    "same_pictures": "none where the questions differ; `{step: exact_duplicates}` leaves out rows "
    "of the same text and the same pictures",
    "similar_pictures": "look at them: copies of other sizes or kinds of file are no new pictures",
    "held_out_pictures": "`{step: split}`, which keeps rows with the same picture on one side",
    "similar_held_out_pictures": "one of the two pictures left out at the source: no step compares "
    "what pictures show",
    "languages": "`{step: language, keep: [en]}`",
    "imbalance": "`{step: balance, column: label}`; for stage=kto also `stage.desirable_weight` "
    "and `stage.undesirable_weight`",
    "one_class": "more rows of the other class: nothing can be learned from one",
    "one_cluster": "`{step: balance, by: kmeans}`",
    "equal_sides": "`{step: repair}` where the sides differ in white space or encoding only; "
    "else leave the pairs out",
    "contradictions": "`{step: aggregate}` or `{step: review}` where column annotator says who "
    "judged; else leave out the side that is wrong",
    "length_bias": "pairs of sides about equally long, or a term of kind length beside the "
    "reward (`reward.terms`)",
    "role_order": "repair the conversations at their source",
    "empty_turns": "`{step: length, low: 1, part: answer}`",
    "wrong_end": "repair the conversations at their source, or read them as prompts "
    "(`data.kind=prompt`)",
    "template_markers": "give the texts without their markers: the tokenizer's chat template "
    "adds them",
    "double_bos": "take the beginning-of-sequence token out of the texts, or out of the chat "
    "template (`data.chat_template`)",
    "double_eos": "take the end-of-sequence token out of the texts, or out of the chat template "
    "(`data.chat_template`)",
    "unrendered": "another chat template (`data.chat_template`), or conversations in the order "
    "that this one asks for",
    "html": "`{step: repair, html: true}`",
    "encoding": "`{step: repair}`",
    "garbled": "`{step: quality}`, which looks at the answers that are imitated; of a pair the "
    "chosen side",
    "repetition": "`{step: quality}`",
    "disagreement": "`{step: review}` for a person to decide, or `{step: aggregate, method: "
    "dawid_skene}`",
    "wrong_labels": "`{step: review}`, and a word with the annotators",
    "suspect_labels": "`{step: label_noise, reward_model: runs/NAME/reward/model}`, which judges "
    "with the run's own reward model",
    "standard_accuracy": "gold items with the column gold; `{step: review}` where the labels "
    "fall short",
    "standard_kappa": "several annotators (column annotator) on some of the items, and clearer "
    "instructions where they differ",
    "standard_rows": "more rows, or an easier task",
}
