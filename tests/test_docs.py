"""What the documentation says is true: its Python runs, its commands load, its links and names exist."""

import importlib
import io
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import flowalign.trainers
from flowalign.config import load_config
from flowalign.config.layers import split_arguments
from flowalign.models import LoRA, load_policy
from tests.helpers.families import SHIPPED_WORLDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SIGN = "\N{SECTION SIGN}"
# notes that are not in the repository
ABSENT = re.compile(f"{SIGN}|grpo_{'family'}|other_{'trainers'}|forward_{'process'}(?:[.]md| {SIGN})")
UNUSED = {"Process"}  # a credit whose scores no trainer provides
TEACHER = "policy.roles.teacher={init: reference}"
LINK = re.compile(r"\]\(([^)#\s]*)(#[\w-]+)?\)")


def of_kind(*suffixes: str) -> list[Path]:
    folders = [ROOT / name for name in ("configs", "docs", "flowalign", "rewards", "samplers", "scripts", "tests")]
    files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.glob("*"))
    return sorted(path for path in files if path.suffix in suffixes)


def citations(paths: list[Path]) -> list[str]:
    """Lines that cite what is not in the repository."""
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ABSENT.search(line)
    ]


# ------------------------------------------------------------------------------------------ citations, links, names


def test_pages_and_configurations_cite_nothing_that_is_absent() -> None:
    paths = of_kind(".md", ".yaml", ".toml")
    assert len(paths) > 15 and not citations(paths)


def test_python_cites_nothing_that_is_absent() -> None:
    paths = of_kind(".py")
    assert len(paths) > 150 and not citations(paths)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_relative_link_exists(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor[1:] in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_path_that_is_named_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it names what was
        return
    names = re.findall(r"`((?:configs|docs|flowalign|rewards|samplers|scripts|tests)/[\w./]*)`", page.read_text())
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_table_of_folders_is_complete() -> None:
    section = (ROOT / "README.md").read_text().partition("## Where is what")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.M)
    named = {name.removeprefix("flowalign/").strip("/") for row in rows for name in re.findall(r"`([\w./]+)`", row)}
    packages = {path.parent.name for path in (ROOT / "flowalign").glob("*/__init__.py")}
    assert packages <= named, packages - named
    assert {"samplers", "rewards", "samplers/kernels", "samplers/plans", "configs", "docs", "scripts", "tests"} <= named


def test_the_tables_of_parts_name_what_there_is() -> None:
    """Each name is importable, and each exported choice of a package is named."""
    section = (ROOT / "docs" / "methods.md").read_text().partition("## Parts")[2].partition("\n## ")[0]
    names = set(re.findall(r"`([A-Z]\w+)`", section))
    packages = [
        importlib.import_module(name)
        for name in (
            "samplers",
            "flowalign.credit",
            "flowalign.advantage",
            "flowalign.objectives",
            "flowalign.selectors",
            "flowalign.truncations",
        )
    ]
    for name in names:
        assert any(name in vars(package) for package in (*packages, flowalign.trainers)), name
    for package, method in (
        *zip(packages[1:], ("assign", "compare", "weigh", "choose", "passes"), strict=True),
        (packages[3], "clipped"),
    ):
        choices = {name for name in package.__all__ if method in vars(vars(package)[name])}
        protocols = {name for name in choices if vars(vars(package)[name]).get("_is_protocol")}
        assert choices - protocols - UNUSED <= names, choices - protocols - names


def test_the_parameters_of_the_parts_are_those_of_the_code() -> None:
    written = runpy.run_path(str(ROOT / "scripts" / "write_reference.py"))
    page = (ROOT / "docs" / "methods.md").read_text()
    assert page == written["with_reference"](page), "run scripts/write_reference.py"
    assert "| `Sliding` | `every=25`, `stride=1`" in page and "`credit=Broadcast`" in page
    assert "`RapidReader` |" not in page  # a part of a reward, none itself


def test_the_list_of_rewards_is_that_of_the_code() -> None:
    written = runpy.run_path(str(ROOT / "scripts" / "write_reference.py"))
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert page == written["with_rewards"](page), "run scripts/write_reference.py"
    assert "| `CLIPScore` | images | terminal | [-1, 1] |" in page


def test_the_guarded_reward_of_the_page_is_a_layer(tiny_pipeline: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n# guarded\.yaml.*?\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.S)
    (tmp_path / "guarded.yaml").write_text(block)
    config, _ = load_config(
        ["configs/glyphs_trees.yaml", str(tmp_path / "guarded.yaml")], [f"policy.path={tiny_pipeline}"]
    )
    assert config.reward.how == "wco" and [part.name for part in config.reward.rewards] == ["letters", "words"]
    assert config.evaluation.rewards[1].statistics == ("saturation", "edges", "black", "flat")


def test_a_method_of_the_page_holds_what_makes_it_that_method(tiny_pipeline: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n# my_method\.yaml\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.S)
    (tmp_path / "my_method.yaml").write_text(block)
    files = [str(tmp_path / "my_method.yaml"), "configs/models/glyphs.yaml", "configs/rewards/ocr_glyphs.yaml"]
    config, plain = load_config(files, [f"policy.path={tiny_pipeline}"])
    assert plain["trainer"]["init_args"]["signal"]["credit"]["class_path"] == "flowalign.credit.Broadcast"
    assert plain["trainer"]["init_args"]["step_weight"]["class_path"] == "flowalign.objectives.Uniform"
    assert config.rollout.plan.forecast(10, 12).edges == 48


def test_the_yaml_of_distillation_is_a_layer(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Several teachers over DiffusionOPD, a gated one beside Flow-GRPO; here every folder of a LoRA is one that was just saved."""
    lora = LoRA(rank=2, alpha=2, targets=("attn.to_q",))
    load_policy(str(tiny_pipeline), lora=lora).save_lora(tmp_path / "lora")
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "KITE", "task": "ocr"}\n{"prompt": "MOON", "task": "geneval"}\n'
    )
    section = (ROOT / "docs" / "methods.md").read_text().partition("## On-policy distillation")[2].partition("\n## ")[0]
    blocks = re.findall(r"```yaml\n(.*?)```", section, re.S)
    changes = [f"policy.path={tiny_pipeline}", "evaluation.allow_training_prompts=true"]
    found = []
    for block, method, more in zip(blocks, ("diffusion_opd", "flow_grpo"), ([], [TEACHER]), strict=True):
        text = re.sub(r"runs/\w+/lora", str(tmp_path / "lora"), block)
        (tmp_path / "layer.yaml").write_text(text.replace("prompts.jsonl", str(tmp_path / "prompts.jsonl")))
        files = [f"configs/methods/{method}.yaml", "configs/models/glyphs.yaml", "configs/rewards/ocr_glyphs.yaml"]
        config, _ = load_config([*files, str(tmp_path / "layer.yaml")], [*changes, *more])
        found.append(config.trainer)
    several, gated = found
    assert several.route.teachers == {"ocr": "teacher_ocr", "geneval": "teacher_geneval"}
    assert several.teachers["teacher_geneval"].guidance_scale == 4.5
    assert gated.supervision["opd"].gate.min_reward == 1


def test_the_glossary_has_every_word_once_and_in_order() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    words = [word for word, _ in rows]
    assert len(words) > 50 and words == sorted(set(words), key=str.lower)
    assert all(meaning.endswith(".") and len(meaning) < 150 for _, meaning in rows)


# ------------------------------------------------------------------------------------------ Python


@pytest.fixture(scope="module")
def concepts() -> dict[str, Any]:
    """The names that the Python of docs/concepts.md leaves."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "concepts.md").read_text(), re.S):
        exec(block, names)
    return names


def test_the_picture_of_the_tree_can_be_redrawn(concepts: dict[str, Any]) -> None:
    drawn, shipped = (
        pil_to_tensor(Image.open(source).convert("L")).float()
        for source in (io.BytesIO(concepts["picture"]), ROOT / "docs" / "pictures" / "tree.png")
    )
    assert drawn.shape == shipped.shape
    assert float((drawn - shipped).abs().mean()) < 1.0  # of 255; fonts may differ by a pixel


def test_the_figures_of_the_concepts_are_right(concepts: dict[str, Any]) -> None:
    cost = concepts["shape"].cost()
    assert (cost.rollout, cost.leaves * 8, cost.train, cost.edges) == (56, 144, 13, 21)
    tree = concepts["tree"]
    rows = [len(tree.parent[nodes].unique()) for nodes in tree.generations[1:]]
    assert (len(tree), rows, sum(rows), len(tree.leaves) * 6) == (19, [1, 1, 1, 4, 4, 4], 15, 24)
    assert (len(concepts["edges"]), len(concepts["parents"])) == (8, 5)
    assert float((concepts["ratio"].detach() - 1).abs().max()) <= 1e-6 and bool(concepts["shift"].grad != 0)
    by_hand, of_engine = concepts["log_prob"], concepts["forest"].log_prob
    torch.testing.assert_close(by_hand, of_engine, rtol=0, atol=0, equal_nan=True)


def test_the_main_loop_of_the_concepts_is_that_of_the_code() -> None:
    page, code = ((ROOT / name).read_text() for name in ("docs/concepts.md", "flowalign/loop.py"))
    (shown,) = re.findall(r"```text\n(trainer\.prepare.*?)```", page, re.S)
    lines = [line.partition("#")[0].strip() for line in shown.splitlines()]
    loop = [line.strip() for line in code.splitlines()]
    begin = loop.index(lines[0])
    assert loop[begin : begin + len(lines)] == lines


# ------------------------------------------------------------------------------------------ commands


def commands() -> list[tuple[str, list[str]]]:
    """(page, arguments) of every command line in README, docs and Makefile that names a configuration."""
    found = []
    for path in (*PAGES, ROOT / "Makefile"):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = re.findall(r"^(?: {4}|\t)(.*(?:scripts/train\.py|flowalign (?!compare|evaluate)\w+) .*)$", text, re.M)
        plans = re.findall(r"^ {4}(rollout\.group_size=.*)$", text, re.M)  # what docs/benchmark.md puts for PLAN
        for line in lines:
            arguments = shlex.split(line.partition(" #")[0])
            start = next(place for place, word in enumerate(arguments) if word in ("flowalign", "scripts/train.py"))
            arguments = arguments[start + (2 if arguments[start] == "flowalign" else 1) :]
            for option in [word for word in arguments if word.startswith("--")]:
                place = arguments.index(option)
                del arguments[place : place + 2]
            if any(word.startswith("configs/") for word in arguments):
                for plan in plans if "PLAN" in arguments else [""]:
                    filled = [word for word in arguments if word != "PLAN"] + shlex.split(plan)
                    found.append((path.name, filled))
    return found


def test_commands_are_found() -> None:
    pages = [page for page, _ in commands()]
    assert {"README.md", "methods.md", "benchmark.md", "doctor.md", "Makefile"} <= set(pages)
    assert pages.count("benchmark.md") == 4


@pytest.mark.parametrize(
    ("page", "arguments"), commands(), ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else value
)
def test_every_command_loads(
    page: str, arguments: list[str], tiny_pipeline: Path, tiny_sd15_pipeline: Path, large_machine: None, tmp_path: Path
) -> None:
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "rewards.md").read_text()
    rewards = re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", pages, re.S)
    (method,) = re.findall(r"```yaml\n# my_method\.yaml\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.S)
    (server,) = re.findall(r"```yaml\n# server\.yaml\n(.*?)```", (ROOT / "docs" / "places.md").read_text(), re.S)
    for name, block in [*rewards, ("my_method.yaml", method), ("server.yaml", server)]:
        (tmp_path / name).write_text(block)
    for name in ("./my_rewards.py", "./my_scorer.py", "my_method.yaml", "server.yaml"):
        arguments = [word.replace(name, str(tmp_path / Path(name).name)) for word in arguments]
    files, overrides = split_arguments(arguments)
    path = str(tiny_sd15_pipeline if "configs/models/sd15.yaml" in files else tiny_pipeline)
    path = next((world for world in SHIPPED_WORLDS if any(world.replace("-", "_") in file for file in files)), path)
    for (
        given
    ) in overrides:  # a pipeline that comes with flowalign stays: a role of the same command may start from another
        path = given.partition("=")[2] if given.startswith("policy.path=glyphs") else path
    config, _ = load_config(files, [*overrides, f"policy.path={path}"])
    assert config.policy.path == path


def test_the_yaml_of_the_readme_is_a_layer(tmp_path: Path, tiny_pipeline: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        (tmp_path / "layer.yaml").write_text(block)
        _, plain = load_config(
            ["configs/glyphs_trees.yaml", str(tmp_path / "layer.yaml")], [f"policy.path={tiny_pipeline}"]
        )
        assert plain["rollout"]["plan"]["class_path"] == yaml.safe_load(block)["rollout"]["plan"]["class_path"]
