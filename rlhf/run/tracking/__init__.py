"""Metrics of a run: files always, and beside them Weights & Biases or TensorBoard.

tracker.py writes the lines of files.py and passes every figure on; the backends beside them are
TensorBoard in files.py and W&B in wandb.py. A new tracker is a class with the methods of
`tracker.Backend`, a choice in conf's TrackingKind, a case in `tracker.make_backend` and in
`tracker.check`, a preset in conf/tracking/, its library in pyproject's extra `tracking` and in
tests/test_layers.py.
"""
