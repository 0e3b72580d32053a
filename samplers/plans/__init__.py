"""Plans: which steps are stochastic and where samples split. Pure data; each gives the Tree of one group.

`chain`, `window`, `branch`, `tree` and `scattered` are functions for direct use; the classes are the same with a
schedule over iterations, for configurations. Probed, Compressed, Sourced, Selected and Leveled wrap another plan. A plan of your
own is a dataclass with `tree` (built by Tree.from_parents), `forecast` and `select`, and with `extremes` if it is to be
wrapped.
"""

from samplers.plans.base import Bounded, Plan
from samplers.plans.branching import Branch, SplitTree, TreeWindow, branch, tree
from samplers.plans.chains import Chain, RandomSteps, Window, chain, scattered, window
from samplers.plans.completions import Compressed, Probed, compressed, probed
from samplers.plans.deterministic import Deterministic
from samplers.plans.leveled import Leveled
from samplers.plans.positions import Fixed, Position, Random, Sliding
from samplers.plans.selected import Selected
from samplers.plans.sources import Sourced

__all__ = [
    "Bounded", "Plan", "Branch", "SplitTree", "TreeWindow", "branch", "tree",
    "Chain", "RandomSteps", "Window", "chain", "scattered", "window",
    "Compressed", "Probed", "compressed", "probed", "Deterministic", "Fixed", "Leveled", "Position", "Random", "Sliding", "Selected", "Sourced",
]  # fmt: skip
