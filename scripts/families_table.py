"""Check every model family: docs/results/families.json and .md.

`python scripts/families_table.py --output docs/results/families`

Runs the conformance tests of the families, slow ones too, on their tiny random pipelines (fp32, CPU), and keeps what each check
noted: {family: {check: value}}, of several numbers the largest. Nothing is written unless all tests pass. `--only klein` (pytest's -k) runs a
part of them and replaces what these noted before. From a checkout, with the extra `dev`.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from flowalign.storage.files import write_atomic

ROOT = Path(__file__).parents[1]
TESTS = [f"tests/conformance/test_{name}.py" for name in ("families", "family_training", "family_switches")]
Value = float | str
Found = dict[str, dict[str, Value]]


def main() -> int:
    """The tests, then the two files and the table on the screen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path of the .json and .md without its ending")
    parser.add_argument("--only", default="", help="pytest's -k: a part of the families or checks")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "", "-n", str(arguments.processes), "-k", arguments.only, f"--junitxml={report}"]
        code = subprocess.run([sys.executable, "-m", "pytest", *TESTS, *options], cwd=ROOT).returncode
        found = read(report)
    print(table(found))
    if code == 0:
        path = arguments.output.with_suffix(".json")
        found = updated(json.loads(path.read_text()), found) if arguments.only and path.exists() else found
        write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
        write_atomic(path.with_suffix(".md"), page(found).encode())
    return code


def updated(known: Found, found: Found) -> Found:
    """`known` with the values that were found anew."""
    names = sorted({*known, *found})
    return {name: {**known.get(name, {}), **found.get(name, {})} for name in names}


def read(report: Path) -> Found:
    """What the tests noted as "family/check", families by name, checks in the order of the tests."""
    found: defaultdict[str, dict[str, Value]] = defaultdict(dict)
    order: dict[str, int] = {}
    for noted in sorted(ElementTree.parse(report).iter("testcase"), key=_place):
        for each in noted.iter("property"):
            family, check = each.attrib["name"].split("/")
            order.setdefault(check, len(order))
            found[family][check] = larger(found[family].get(check), each.attrib["value"])
    return {name: dict(sorted(found[name].items(), key=lambda item: order[item[0]])) for name in sorted(found)}


def _place(case: ElementTree.Element) -> tuple[str, str]:
    return case.attrib["classname"], case.attrib["name"]


def larger(known: Value | None, text: str) -> Value:
    """Of numbers the larger one; a text stays."""
    try:
        value = float(text)
    except ValueError:
        return text
    value = int(value) if value.is_integer() else value
    return max(known, value) if isinstance(known, int | float) else value


def table(found: Found) -> str:
    """In Markdown, a line per check and a column per family."""
    checks = list(dict.fromkeys(check for values in found.values() for check in values))
    rows = [["", *found], ["---"] * (len(found) + 1)]
    rows += [[check, *(shown(values.get(check, "–")) for values in found.values())] for check in checks]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:g}"


def page(found: Found) -> str:
    """The table with what its lines mean."""
    return f"""# Model families

Written by `python scripts/families_table.py --output docs/results/families`: the same tests for every family, on tiny random
pipelines of the real classes with the released schedulers, in fp32 on a CPU.

* **parity**: the largest difference of our deterministic rollout's latents from those of the pipeline's own call, over plain and
  guided, 1 and 4 steps, three sizes and numbers of frames; **levels** the same over two grids that are not the scheduler's. For ε- and
  v-models (SD 1.5, SD 2.1, SDXL) relative to the norm, since our step is one affine map there.
* **images**: the largest difference of decoded pixels.
* **evaluations per image**: counted in one iteration of Flow-GRPO of 3 steps, equal to the formula.
* **log ratio**: the largest |log ratio| of an unchanged policy on its own rollout; **tree** the same for BranchGRPO's.
* **tensors moved**: LoRA tensors of all networks that the iteration changed. The others (SD3, Qwen-Image) lead to the last block's text
  alone, which nothing reads: with random numbers in them the velocity keeps its bits.
* **LoRA in plain diffusers**: latents of the pipeline with the exported LoRA against the policy's, as parity; **warm start**: velocity of
  a policy from a LoRA that diffusers wrote against the pipeline's, relative to the norm.
* **bf16**: relative distance of the velocity of a bf16 network from that in fp32.
* **gradient checkpointing**: the largest difference of a gradient.

{table(found)}
"""


if __name__ == "__main__":
    sys.exit(main())
