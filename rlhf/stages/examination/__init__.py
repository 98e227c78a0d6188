"""What ``stage=doctor`` examines, a module for each part of a machine and its environment."""
