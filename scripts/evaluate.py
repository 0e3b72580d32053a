"""accelerate launch scripts/evaluate.py MODEL [MODEL ...], with the options of `flowalign evaluate`"""

import sys

from flowalign.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:]))
