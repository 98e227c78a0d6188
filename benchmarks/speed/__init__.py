"""``make bench``: whole online steps of this project and of TRL's GRPOTrainer, side by side in one
run. Not a stage: it compares two programs.
"""
