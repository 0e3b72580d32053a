"""Several processes: sharing work and gathering results, optimizer steps, FSDP2 and DeepSpeed ZeRO-2."""
