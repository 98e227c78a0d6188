"""Tests of rlhf/export/."""
