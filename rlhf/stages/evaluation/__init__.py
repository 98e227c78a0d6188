"""The parts of ``stage=eval``: two states of a policy, and who judges their responses."""
