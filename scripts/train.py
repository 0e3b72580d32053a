"""accelerate launch scripts/train.py CONFIG.yaml [CONFIG.yaml ...] [key=value ...]"""

import sys

from flowalign.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
