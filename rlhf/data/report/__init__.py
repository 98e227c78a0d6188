"""The doctor of data sets (stage=data data.report=true): what is in the rows, what is wrong with
them, and which option repairs it.

`making.make` examines rows and writes report.json and report.html; `terminal.tables` shows the same
on a screen.
"""
