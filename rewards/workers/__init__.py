"""Helper processes for engines that must not live in the training process: the pool, and the script that each one runs."""

from rewards.workers.pool import Message, WorkerError, Workers

__all__ = ["Message", "WorkerError", "Workers"]
