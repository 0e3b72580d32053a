"""python -m tests.campaign [KIND …]: runs the cases of these kinds, or all, and prints a table of what came of them."""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from tests.campaign.case import Server, expected
from tests.campaign.given import make
from tests.campaign.inputs import CASES
from tests.helpers.forks import Forks

if __name__ == "__main__":
    kinds = sys.argv[1:] or list(CASES)
    wrong, counts = [], {}
    with tempfile.TemporaryDirectory() as folder:
        forks = Forks()
        server = Server(make(Path(folder) / "given", forks), forks)
        for kind in kinds:
            counts[kind] = Counter()
            for number, case in enumerate(tqdm(CASES[kind], desc=kind)):
                outcome, text = server.run(case, Path(folder) / kind / str(number))
                counts[kind][outcome] += 1
                if outcome != expected(case):
                    wrong.append(f"\n=== {kind}: {case.name}: {outcome}\n" + "\n".join(text.splitlines()[-12:]))
        forks.close()
    print("\n".join(wrong))
    outcomes = ("clear", "fine", "unclear", "silent", "traceback", "hang")
    print(f"{'':10}" + "".join(f"{name:>11}" for name in (*outcomes, "all")))
    for kind, count in counts.items():
        print(f"{kind:10}" + "".join(f"{count[name]:>11}" for name in outcomes) + f"{count.total():>11}")
    print(f"{len(wrong)} not as expected")
