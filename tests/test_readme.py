"""What the README tells its reader to write in Python runs."""

import re
from pathlib import Path
from typing import Any

import torch


def test_the_python_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["redness"](torch.rand(2, 3, 4, 4), ["a", "b"]).shape == (2,)
    assert len(names["result"].scores["ocr"]) == len(names["images"]) == 2
    assert len(names["log_probs"]) == 16 and names["forest"].evaluations == 45
