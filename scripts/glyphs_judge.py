"""Serve a judge of Glyphs edits that measures by rules and answers as EditScore's and PARM's vision-language models do.

`python scripts/glyphs_judge.py --port 8765`, and in another terminal
`flowalign train configs/glyphs_edit.yaml configs/rewards/edit_score_glyphs.yaml`

So the protocol of those rewards can be trained through on a laptop. What it measures: flowalign/glyphs/edit/judge.py.
"""

import argparse
import threading

import torch

from flowalign.glyphs.edit.judge_server import GlyphsJudge


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    parser.add_argument(
        "--score-range", type=int, default=25, help="largest number of an answer, EditScore's score_range"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with GlyphsJudge(arguments.port, arguments.score_range) as judge:
        print(f"serving {judge.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    main()
