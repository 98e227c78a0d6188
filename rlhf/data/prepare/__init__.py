"""Preparation: a pipeline of steps over rows (data.pipeline), each with its count in and out and a
reason for every row that it leaves out. As a library: rlhf.data.prepare.pipeline.run.
"""
