"""Advantage: values of edges -> advantages inside a declared set."""

from flowalign.advantage.asymmetric import Asymmetric
from flowalign.advantage.base import Advantage, Advantages, SignalContext, Within, set_keys
from flowalign.advantage.gated import VarianceGated
from flowalign.advantage.mix import Mixed, PerChannel
from flowalign.advantage.normalized import Normalized
from flowalign.advantage.prompt_tracker import PromptTracker
from flowalign.advantage.weights import Best, BestAndWorst, Constant, Exponential, SoftClipped
from flowalign.advantage.win_rate import WinRate

__all__ = [
    "Advantage", "Advantages", "Asymmetric", "Best", "BestAndWorst", "Constant", "Exponential", "Mixed", "Normalized",
    "PerChannel", "PromptTracker", "SignalContext", "SoftClipped", "VarianceGated", "WinRate", "Within", "set_keys",
]  # fmt: skip
