"""Formats of rows that are read and written (conf/choices.py has all other choices)."""

from enum import Enum


class DataFormat(Enum):
    """Formats of data files; which of them a stage reads is in rlhf/data/formats/."""

    auto = "auto"
    text = "text"
    prompt = "prompt"
    prompt_completion = "prompt_completion"
    messages = "messages"
    alpaca = "alpaca"
    sharegpt = "sharegpt"
    preference = "preference"
    implicit_preference = "implicit_preference"
    ultrafeedback = "ultrafeedback"
    hh_rlhf = "hh_rlhf"
    hh_rlhf_messages = "hh_rlhf_messages"  # the same file, its transcripts as turns
    alpaca_preference = "alpaca_preference"
    sharegpt_preference = "sharegpt_preference"
    swift_preference = "swift_preference"
    rejected_messages = "rejected_messages"
    chosen_messages = "chosen_messages"
    openai_preference = "openai_preference"
    xlam = "xlam"
    unpaired = "unpaired"
    sharegpt_unpaired = "sharegpt_unpaired"
    messages_unpaired = "messages_unpaired"
    alpaca_unpaired = "alpaca_unpaired"
    shp = "shp"
    nectar = "nectar"
    alpaca_eval = "alpaca_eval"
    alpaca_eval_annotation = "alpaca_eval_annotation"
    mt_bench_answer = "mt_bench_answer"
    mt_bench_judgment = "mt_bench_judgment"
    rewardbench = "rewardbench"
    label_studio = "label_studio"
    label_studio_ranker = "label_studio_ranker"
    argilla = "argilla"
    label_sheet = "label_sheet"
    question = "question"
    question_answer = "question_answer"
    question_judged = "question_judged"
    question_preference = "question_preference"
    compared = "compared"
    rated = "rated"
    summaries = "summaries"
    dialogue = "dialogue"
    message_tree = "message_tree"
    verifiable = "verifiable"


class DataTarget(Enum):
    """Formats that stage=data writes (rlhf/data/targets.py)."""

    trl = "trl"  # the columns that every stage reads, whatever the kind
    kto = "kto"  # TRL's unpaired columns; a pair becomes two rows
    messages = "messages"  # OpenAI's; pairs in ms-swift's way (rejected_response)
    sharegpt = "sharegpt"  # with LLaMA-Factory's chosen and rejected, or kto_tag
    alpaca = "alpaca"  # with LLaMA-Factory's chosen and rejected, or kto_tag
    hh_rlhf = "hh_rlhf"
    ultrafeedback = "ultrafeedback"
    shp = "shp"
    nectar = "nectar"
    rewardbench = "rewardbench"
    alpaca_eval = "alpaca_eval"  # outputs, or annotations for pairs
    label_studio = "label_studio"
    label_studio_ranker = "label_studio_ranker"
    argilla = "argilla"
    csv = "csv"  # a label sheet for pairs, else TRL's columns, in a CSV file
    xlsx = "xlsx"  # the same in an Excel file
