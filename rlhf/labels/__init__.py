"""Preference labels: what goes out to people and what comes back.

records     what everything here passes around: answers, tasks, an export, judgements
ledger      an export in its run directory: what was asked, and what is hidden from those who answer
choice      which pairs are worth a person's time
targets     tasks as the files of labelling tools, and labels read back from them
"""
