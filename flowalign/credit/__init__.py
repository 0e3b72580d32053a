"""Credit: scores of leaves, of probes or of states -> one scalar per edge and channel, with a validity."""

from flowalign.credit.base import Credit, EdgeValues
from flowalign.credit.gains import Gain, TurningPoint
from flowalign.credit.joined import Joined, Process, ReturnToGo
from flowalign.credit.leaves import BranchLocal, Broadcast, SubtreeFusion

__all__ = [
    "BranchLocal", "Broadcast", "Credit", "EdgeValues", "Gain", "Joined", "Process", "ReturnToGo", "SubtreeFusion",
    "TurningPoint",
]  # fmt: skip
