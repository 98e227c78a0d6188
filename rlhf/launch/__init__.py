"""What starts the processes of a run (the group ``launch``): trainer ranks and rollout servers on
this machine, under torchrun, as a SLURM job, or on a Ray cluster.

Each process is a command ``python -m rlhf``; ranks get torchrun's environment variables. Nothing
here imports torch, and nothing watches over a run beyond starting and ending its processes.
"""
