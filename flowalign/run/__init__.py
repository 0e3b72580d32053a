"""A run: everything it owns between the first line of the loop and the last, and nothing of a method.

run.py is the context and the verbs of the loop; beside it one file per thing it owns: folder, launch settings, stop
requests, checks before loading, the trial of rewards, checkpoints, the log of iterations, evaluations.
"""
