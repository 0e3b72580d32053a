"""`flowalign train`, launched on CPUs as accelerate launches FSDP2 or DeepSpeed on GPUs; run by tests/distributed.

accelerate offers both on GPUs only, so its state is changed once the Accelerator is there. `python -m
tests.helpers.sharded_run replicated|fsdp2|zero2 CONFIG [key=value ...]`.
"""

import gc
import os
import sys

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

from flowalign import cli
from flowalign.distributed.fsdp2 import Lockstep
from flowalign.run import launch


def set_kind(kind: DistributedType) -> None:
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = kind


def fsdp2(*args, **kwargs) -> Accelerator:
    accelerator = Accelerator(*args, **kwargs)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, reshard_after_forward=True)
    set_kind(DistributedType.FSDP)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def zero2(*args, **kwargs) -> Accelerator:
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # or it compiles an all-reduce for CPUs
    accelerator = Accelerator(*args, **kwargs)
    plugin = DeepSpeedPlugin(zero_stage=2)
    plugin.set_mixed_precision("no")
    set_kind(DistributedType.DEEPSPEED)
    plugin.select(_from_accelerator_state=True)
    AcceleratorState._shared_state["deepspeed_plugins"] = plugin
    return accelerator


if __name__ == "__main__":
    weights = sys.argv[1]
    launch.Accelerator = {"replicated": Accelerator, "fsdp2": fsdp2, "zero2": zero2}[weights]
    code = cli.train(sys.argv[2:])
    locksteps = [thing for thing in gc.get_objects() if type(thing) is Lockstep]
    assert len(locksteps) == (weights == "fsdp2")
    print(f"dummy calls: {sum(lockstep.dummy_calls for lockstep in locksteps)}", flush=True)
    os._exit(code)  # torch's threads sometimes abort the interpreter's own exit, after all is done
