"""Tests of rlhf/serving/."""
