"""The web page of ``stage=board``: server-rendered pages over files that runs and jobs write."""

OWN = ".board"  # the folder in run.dir of what the board itself keeps
