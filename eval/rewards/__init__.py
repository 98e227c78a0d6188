"""Reward models looked at: accuracy.py by kind of pair, calibration.py, best_of.py, fitting.py the
laws of over-optimisation, ensembles.py; sections.py and plots.py are their parts of the report.
"""
