"""Rewards of a user's own that fail, answer in a wrong form, change the process, or cannot be found."""

from __future__ import annotations

from tests.campaign.case import Case

HEAD = """
import math, os, sys, time, random, threading
import numpy as np
import torch
from rewards import RewardBatch, RewardOutput, RewardSpec, RewardError

def good(images, prompts):
    return images.mean((1, 2, 3))
"""
PATH = "reward={class_path: rewards.FunctionReward, init_args: {path: './mine.py:score'}}"
EVALUATED = "evaluation.rewards=[{class_path: rewards.FunctionReward, init_args: {path: './mine.py:score'}}]"


def body(
    name: str, lines: str, says: str = "score", *, fine: bool = False, overrides: tuple[str, ...] = (PATH,)
) -> Case:
    """A function `score(images, prompts)` of these lines."""
    text = "\n    ".join(lines.split("\n"))
    return Case(
        name, overrides, {"mine.py": f"{HEAD}\ndef score(images, prompts):\n    {text}\n"}, says=says, fine=fine
    )


def returns(expression: str, says: str = "score", *, fine: bool = False) -> Case:
    return body(f"returns {expression}", f"return {expression}", says, fine=fine)


def later(name: str, lines: str, says: str = "score") -> Case:
    """Good in the trial, whose last image is black, and bad on real ones."""
    return body(f"later: {name}", f"if not images[-1].any():\n    return [0.0] * len(prompts)\n{lines}", says)


def module(name: str, text: str, override: str, says: str, *, fine: bool = False) -> Case:
    return Case(name, (override,), {"mine.py": HEAD + text}, says=says, fine=fine)


CLASS = """
class Mine:
    name = "mine"
    spec = RewardSpec()
    def __init__(self, scale: float = 1.0):
        self.scale = scale
    def __call__(self, batch):
        scores = batch.images.mean((1, 2, 3)).float()
        return RewardOutput(scores, torch.ones(len(batch), dtype=torch.bool))
    def load(self): pass
    def close(self): pass
"""


def cls(name: str, old: str, new: str, says: str, *, fine: bool = False) -> Case:
    """A class in which `old` is replaced."""
    assert old in CLASS
    return module(f"class: {name}", CLASS.replace(old, new), "reward=./mine.py:Mine", says, fine=fine)


SCORES = "scores = batch.images.mean((1, 2, 3)).float()"
ANSWER = "return RewardOutput(scores, torch.ones(len(batch), dtype=torch.bool))"

CASES = [
    returns("images.mean((1, 2, 3))", "", fine=True),
    returns("images.mean((1, 2, 3)).tolist()", "", fine=True),
    returns("images.mean((1, 2, 3)).numpy()", "", fine=True),
    returns("images.mean((1, 2, 3)).double()", "", fine=True),
    returns("[float(image.mean()) for image in images]", "", fine=True),
    returns("None"),
    returns("0.5"),
    returns("images"),
    returns("images.mean()"),
    returns("images.mean((1, 2, 3))[:1]"),
    returns("torch.cat([images.mean((1, 2, 3))] * 2)"),
    returns("images.mean((2, 3))"),
    returns("'good'"),
    returns("prompts"),
    returns("{'score': 1.0}"),
    returns("[None] * len(prompts)"),
    returns("[math.nan] * len(prompts)"),
    returns("[math.inf] * len(prompts)"),
    returns("[-math.inf] * len(prompts)"),
    returns("torch.full((len(prompts),), torch.nan)"),
    returns("[]"),
    returns("[[1.0]]"),
    returns("[True, 'x'] * len(prompts)"),
    returns("[1e400] * len(prompts)"),
    returns("[1e39] * len(prompts)"),
    returns("[complex(1, 1)] * len(prompts)"),
    returns("torch.ones(len(prompts), dtype=torch.complex64)"),
    returns("np.array(['a'] * len(prompts))"),
    returns("np.array([None] * len(prompts), dtype=object)"),
    returns("(x for x in [1.0, 2.0])"),
    returns("lambda: 1.0"),
    returns("torch.ones(len(prompts), device='meta')"),
    body("raises", "raise ValueError('no such thing')", "no such thing"),
    body("raises nothing to say", "raise Exception", "Exception"),
    body("an assertion", "assert images.shape[0] == 99", "AssertionError"),
    body("divides by zero", "return [1 / 0]", "division"),
    body("an attribute error", "return images.nothing", "nothing"),
    body("a key error", "return {}['key']", "key"),
    body("imports what is not there", "import no_such_module", "no_such_module"),
    body("recursion", "return score(images, prompts)", "[Rr]ecursion"),
    body("out of memory", "return torch.empty(10**15)", "memory|allocate"),
    body("reads a file that is not there", "return open('no_such_file').read()", "no_such_file"),
    body("a system exit", "sys.exit(0)", "Exit"),
    body("a system exit with a code", "sys.exit(3)", "Exit"),
    body("quit", "raise SystemExit('bye')", "bye"),
    body("a keyboard interrupt", "raise KeyboardInterrupt", "stopped at once"),
    body("a generator exit", "raise GeneratorExit", "GeneratorExit"),
    body("stop iteration", "raise StopIteration", "StopIteration"),
    body("a fork whose child comes back", "if os.fork() == 0:\n    return images.mean((1, 2, 3))\nos.wait()\nreturn images.mean((1, 2, 3))", "", fine=True),
    body("changes the folder", "os.chdir('/')\nreturn images.mean((1, 2, 3))", "", fine=True),
    body("changes the default dtype", "torch.set_default_dtype(torch.float64)\nreturn images.mean((1, 2, 3))", "", fine=True),
    body("turns gradients off", "torch.set_grad_enabled(False)\nreturn images.mean((1, 2, 3))", "", fine=True),
    body("seeds everything", "torch.manual_seed(0); np.random.seed(0); random.seed(0)\nreturn images.mean((1, 2, 3))", "", fine=True),
    body("changes the images", "images.zero_()\nreturn [0.5] * len(prompts)", "images.*clone"),
    body("changes the prompts", "prompts.clear()\nreturn images.mean((1, 2, 3))", "", fine=True),
    body("prints", "print('hello')\nreturn images.mean((1, 2, 3))", "", fine=True),
    body("closes the output", "sys.stdout.close()\nreturn images.mean((1, 2, 3))", "close"),
    body("is constant", "return [0.5] * len(prompts)", "", fine=True),
    body("a wrong name", "return imges.mean()", "imges"),
    later("raises", "raise ValueError('white images')", "white images"),
    later("returns one", "return [1.0]"),
    later("returns nothing", "return None"),
    later("returns only NaN", "return [math.nan] * len(prompts)"),
    later("exits", "sys.exit(0)", "Exit"),
    later("infinite", "return [math.inf] * len(prompts)"),
    body("evaluated: raises", "raise ValueError('no such thing')", "no such thing", overrides=(EVALUATED,)),
    body("evaluated: None", "return None", overrides=(EVALUATED,)),
    body("evaluated: NaN", "return [math.nan] * len(prompts)", overrides=(EVALUATED,)),
    body("evaluated: works", "return images.mean((1, 2, 3))", "", fine=True, overrides=(EVALUATED,)),
    module("no parameters", "\ndef score(): return [1.0]\n", PATH, "score"),
    module("one parameter", "\ndef score(images): return images.mean((1, 2, 3))\n", PATH, "score"),
    module("an unknown column", "\ndef score(images, prompts, animal): return [1.0] * len(prompts)\n", PATH, "animal"),
    module("a column with a default", "\ndef score(images, prompts, animal=None): return images.mean((1, 2, 3))\n", PATH, "", fine=True),
    module("a syntax error", "\ndef score(images, prompts) return 1\n", PATH, "mine.py"),
    module("an indentation error", "\ndef score(images, prompts):\nreturn 1\n", PATH, "mine.py"),
    module("an import that fails", "\nimport no_such_module\ndef score(images, prompts): return [1.0]\n", PATH, "no_such_module"),
    module("a module that raises", "\nraise RuntimeError('at import')\n", PATH, "at import"),
    module("a module that exits", "\nsys.exit(0)\n", PATH, "Exit|mine.py"),
    module("no such function", "\ndef scores(images, prompts): return [1.0]\n", PATH, "scores"),
    module("not a function", "\nscore = 3\n", PATH, "score"),
    module("an async function", "\nasync def score(images, prompts): return [1.0]\n", PATH, "score"),
    module("a generator", "\ndef score(images, prompts):\n    yield 1.0\n", PATH, "score"),
    Case("no such file", ("reward={class_path: rewards.FunctionReward, init_args: {path: './none.py:score'}}",), says="none.py"),
    Case("no function named", ("reward={class_path: rewards.FunctionReward, init_args: {path: './tiny.yaml'}}",), says="tiny.yaml"),
    Case("no such module", ("reward={class_path: rewards.FunctionReward, init_args: {path: 'no_such.module:score'}}",), says="no_such"),
    Case("an empty path", ("reward={class_path: rewards.FunctionReward, init_args: {path: ''}}",), says="path"),
    Case("no path", ("reward=rewards.FunctionReward",), says="path"),
    Case("no such class", ("reward=rewards.OCRR",), says="OCR"),
    Case("no class at all", ("reward=ocr",), says="ocr|reward"),
    Case("a class of another kind", ("reward=samplers.FlowSDE",), says="FlowSDE"),
    Case("a module", ("reward=rewards",), says="reward"),
    Case("a number", ("reward=3",), says="reward"),
    Case("os.system", ("reward={class_path: os.system, init_args: {command: 'true'}}",), says="os.system"),
    Case("OCR without targets", ("reward=rewards.OCR", "prompts=train.txt"), says="OCR|ocr", files={"train.txt": "a fox\na hen\n"}),
    Case("mask without a batch size", ("reward={class_path: rewards.WithTimeout, init_args: {reward: rewards.JPEGCompressibility, on_error: mask}}",), says="batch_size"),
    Case("a mix without weights", ("reward={class_path: rewards.Mix, init_args: {rewards: [rewards.JPEGCompressibility], weights: []}}",), says="weights"),
    Case("two evaluation rewards of one name", ("evaluation.rewards=[rewards.JPEGCompressibility, rewards.JPEGCompressibility]",), says="name"),
    Case("no evaluation rewards", ("evaluation.rewards=[]",), says="evaluation.rewards"),
    module("a function by its file alone", "", "reward=./mine.py:good", "", fine=True),
    module("a file without a name", "", "reward=./mine.py", "mine.py"),
    module("a file without this class", CLASS, "reward=./mine.py:Mien", "Mine"),
    cls("complete", "pass", "pass", "", fine=True),
    cls("no name", '    name = "mine"\n', "", "name"),
    cls("no spec", "    spec = RewardSpec()\n", "", "spec"),
    cls("a spec that is a text", "RewardSpec()", '"images"', "spec"),
    cls("an unknown input", "RewardSpec()", 'RewardSpec(inputs=("sound",))', "sound"),
    cls("wants videos", "RewardSpec()", 'RewardSpec(inputs=("videos",))', "videos"),
    cls("no load", "    def load(self): pass\n", "", "load"),
    cls("no close", "    def close(self): pass\n", "", "close"),
    cls("no call", "def __call__(self, batch)", "def score(self, batch)", "__call__"),
    cls("a call of two", "def __call__(self, batch)", "def __call__(self, images, prompts)", "__call__"),
    cls("a constructor that raises", "self.scale = scale", "raise RuntimeError('no scale')", "no scale"),
    cls("an argument to give", "scale: float = 1.0", "scale: float", "scale"),
    cls("call raises", SCORES, "raise OSError('no weights here')", "no weights here"),
    cls("returns a tensor", ANSWER, "return scores", "RewardOutput"),
    cls("valid of another dtype", "torch.ones(len(batch), dtype=torch.bool)", "torch.ones(len(batch))", "valid"),
    cls("scores in double", ".float()", ".double()", "float32"),
    cls("scores [N, 1]", ".float()", ".float()[:, None]", "", fine=True),
    cls("two columns", ".float()", ".float()[:, None].expand(-1, 2)", "shape"),
    cls("outside its range", "RewardSpec()", "RewardSpec(range=(5.0, 6.0))", "range|expected 5"),
    cls("two channels, one column", "RewardSpec()", 'RewardSpec(channels=("a", "b"))', "shape"),
    cls("nothing valid", "torch.ones(len(batch), dtype=torch.bool)", "torch.zeros(len(batch), dtype=torch.bool)", "mine"),
]  # fmt: skip
