"""`python scripts/optimize_noise.py MODEL PROMPT ... --rewards REWARD ...`: as `flowalign optimize-noise`."""

import sys

from flowalign.cli import optimize_noise

if __name__ == "__main__":
    sys.exit(optimize_noise(sys.argv[1:]))
