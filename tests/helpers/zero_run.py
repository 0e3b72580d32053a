"""`flowalign train`, launched on CPUs as accelerate launches DeepSpeed on GPUs; by tests/test_zero.py.

accelerate takes DeepSpeed for GPUs alone, so here its state is told afterwards. `python -m tests.helpers.zero_run
replicated|zero2 CONFIG [key=value ...]`.
"""

import os
import sys

from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin

from flowalign import cli
from flowalign.run import run as run_module

Launched = run_module.Accelerator


def zero2(*args, **kwargs):
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # or it compiles an all-reduce for CPUs
    accelerator = Launched(*args, **kwargs)
    plugin = DeepSpeedPlugin(zero_stage=2)
    plugin.set_mixed_precision("no")
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    plugin.select(_from_accelerator_state=True)
    AcceleratorState._shared_state["deepspeed_plugins"] = plugin
    return accelerator


if __name__ == "__main__":
    if sys.argv[1] == "zero2":
        run_module.Accelerator = zero2
    code = cli.train(sys.argv[2:])
    os._exit(code)  # torch's threads sometimes abort the interpreter's own way out, after all is done
