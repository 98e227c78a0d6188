"""Answers of two or more policies compared by a judge that reads both: verdicts.py holds what a
judge says, asking.py asks it in both orders, server.py is a judge behind HTTP, biases.py says how
far it can be trusted, strengths.py and rates.py who wins, summary.py all of it for the report.
"""
