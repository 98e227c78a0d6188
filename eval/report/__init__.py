"""An evaluation for people: comparison.py makes the section of two policies, html.py writes all
sections of an evaluation into report.html and report.json.
"""
