"""The web page of ``stage=board``: server-rendered pages over files that runs and jobs write."""
