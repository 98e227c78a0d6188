"""What a run needs in memory, before anything loads: pure functions from shapes and settings to
bytes.

`shapes` counts parameters, `states` what engines hold of them, `activations` what a pass keeps and
what the generator takes; `moments` are a plan's parts, `plan` puts the roles of a stage together,
moment by moment, `fit` tries the other settings and `tables` shows them. Every formula names its
source and is held against DeepSpeed's own estimators, against tensors counted one by one, and
against measured peaks (tests/checks/test_memory*.py).
"""
