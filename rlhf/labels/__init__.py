"""Preference labels: what goes out to people and what comes back (docs/tasks/labels.md).

Out
    samples, candidates     answers, and which of them may be compared
    choice, selection       which pairs or groups are worth a person's time
    asking                  questions as tasks, with gold and repeated ones among them
    ledger                  an export in its run directory: what was asked, and what is hidden
    targets/                tasks as the files of labelling tools, and labels read back from them
    server                  a Label Studio server
Back
    incoming, checking      judgements read, and checked against the ledgers
    store                   every label, once
    pairs, bradley_terry    what all labels of a pair come to
    report, review          annotators, agreement, and what goes out again
    ab, betting             A/B comparisons of two policies
    versions, card          preference data with its data card

records holds what all of these pass around. Agreement and aggregation by majority and Dawid-Skene
are in rlhf.data, since steps of data preparation need them too and data may not import labels.
"""
