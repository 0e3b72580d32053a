"""python scripts/benchmark.py CONFIG.yaml [CONFIG.yaml ...] [--iterations N] [--variants merged,per-edge] [key=value ...]"""

import sys

from flowalign.cli import benchmark

if __name__ == "__main__":
    sys.exit(benchmark(sys.argv[1:]))
