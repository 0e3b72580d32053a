"""Helper processes for engines that must not run in the training process: the pool, and the script of each process."""

from rewards.workers.pool import Message, WorkerDied, WorkerError, Workers

__all__ = ["Message", "WorkerDied", "WorkerError", "Workers"]
