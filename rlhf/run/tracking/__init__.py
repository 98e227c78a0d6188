"""Metrics of a run: files always, and beside them Weights & Biases or TensorBoard.

tracker.py writes the files and passes every figure on; wandb.py and tensorboard.py are the
backends beside the files. A new tracker is a class with the methods of `tracker.Backend`, a choice
in conf's TrackingKind and a line in `tracker.make_backend`.
"""
