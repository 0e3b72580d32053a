"""Files that survive a kill: atomic writes, checkpoints, named tensors, append-only logs. Knows nothing of training."""
