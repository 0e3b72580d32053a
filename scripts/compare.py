"""python scripts/compare.py SPEC.yaml [--workers N] [--only-report], and as `flowalign compare --help` says"""

import sys

from flowalign.cli import compare

if __name__ == "__main__":
    sys.exit(compare(sys.argv[1:]))
