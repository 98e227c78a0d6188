"""Versions of models in one SQLite file: what they are made of, who holds which alias, and why."""
