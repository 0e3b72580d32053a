"""`flowalign train`, launched on CPUs as accelerate launches FSDP2 on GPUs; by tests/test_sharding.py.

accelerate takes FSDP for GPUs alone, so here its state is told afterwards. `python -m tests.helpers.sharded_run
replicated|sharded CONFIG [key=value ...]`.
"""

import gc
import os
import sys

from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

from flowalign import cli
from flowalign.distributed.fsdp2 import Lockstep
from flowalign.run import run as run_module

Launched = run_module.Accelerator


def fsdp2(*args, **kwargs):
    accelerator = Launched(*args, **kwargs)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, reshard_after_forward=True)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


if __name__ == "__main__":
    if sys.argv[1] == "sharded":
        run_module.Accelerator = fsdp2
    code = cli.train(sys.argv[2:])
    sharded = [thing for thing in gc.get_objects() if type(thing) is Lockstep]
    assert len(sharded) == (sys.argv[1] == "sharded")
    print(f"made up for {sum(lockstep.made_up for lockstep in sharded)} calls", flush=True)
    os._exit(code)  # torch's threads sometimes abort the interpreter's own way out, after all is done
