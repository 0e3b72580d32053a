"""A comparison from its file to its page. Runs train in this process; tests/compare/test_launch.py starts children."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowalign.cli import compare as main
from flowalign.compare import command
from flowalign.compare.plan import Plan, former_record, is_done
from flowalign.compare.record import read_record
from flowalign.compare.spec import Budget, read_spec
from flowalign.config import load_config
from flowalign.config.load import as_written
from flowalign.errors import ConfigError, RunError
from flowalign.models import load_policy
from flowalign.report import summary
from flowalign.storage.files import DamagedFile
from tests.helpers.comparison import InProcess, trained
from tests.helpers.tiny_run import CONFIG

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spec(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(command, "Launcher", InProcess)
    monkeypatch.setattr(summary, "write_report", lambda folder: folder)  # of each run: drawn elsewhere, and slowly
    trained.clear()
    return {
        "files": [], "overrides": [f"policy.path={tiny_pipeline}", "run.iterations=50", "evaluation.every=1"],
        "seeds": [1, 2], "baseline": "plain", "share": 0.5, "budget": {"evaluations": 130},
        "output": str(tmp_path / "runs"), "results": str(tmp_path / "results"), "references": {"guided base": -1.0},
        "methods": {
            "small": {"files": [CONFIG], "overrides": ["rollout.groups=1"], "seeds": [1], "guided": True},
            "plain": {"files": [CONFIG]},
        },
    }  # fmt: skip


def write(tmp_path: Path, spec: dict[str, Any]) -> str:
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return str(tmp_path / "try.yaml")


def test_a_comparison_runs_the_baseline_first_and_gives_the_others_a_share(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, spec)
    assert main([path]) == 0 and trained == ["plain1", "plain2", "small1"]
    found = json.loads((tmp_path / "results" / "try.json").read_text())
    plain, small = found["methods"]["plain"], found["methods"]["small"]
    assert found["denominator_evaluations"] == plain["evaluations"] <= 130
    assert 0 < small["evaluations"] <= 0.5 * plain["evaluations"]
    assert small["guided"] and small["apart"] and "apart" not in plain and plain["seeds"] == [1, 2]
    assert plain["base"] == small["base"] and plain["gain"] == pytest.approx(plain["tuned"] - plain["base"], abs=2e-5)
    assert plain["gain_ci95"][0] <= plain["gain"] <= plain["gain_ci95"][1]

    records = sorted((tmp_path / "results" / "try").glob("plain-*.json"))
    record = json.loads(records[0].read_text())
    images = record["totals"]["decodes"]
    assert images == record["totals"]["reward_calls"] == 6 * record["totals"]["iterations"]
    assert [point["iteration"] for point in record["curve"]] == list(range(record["totals"]["iterations"] + 1))
    assert len(record["on_the_way"]) == len(record["curve"]) - 2 and len(record["uids"]) == 4
    assert record["curve"][-1]["score"] == pytest.approx(sum(record["tuned"][record["reward"]]) / 4, rel=1e-4)

    # again: nothing is trained, and the same is written
    written = {name: (tmp_path / "results" / name).read_bytes() for name in ("try.json", "try.md", "try.html")}
    assert main([path]) == 0 and len(trained) == 3
    assert all((tmp_path / "results" / name).read_bytes() == content for name, content in written.items())
    page = written["try.html"].decode()
    assert (
        page.count("data:image/svg+xml") == 4 + 1 and "Listed apart" in page and "http" not in page.split("</style>")[1]
    )
    table = written["try.md"].decode()
    assert "| plain | 2 |" in table and "| small (guided) | 1 |" in table and "guided base: -1.000" in table


def test_a_larger_budget_goes_on_in_the_same_folders(spec: dict[str, Any], tmp_path: Path) -> None:
    spec |= {"methods": {"plain": {"files": [CONFIG]}}, "seeds": [1], "share": None}
    del spec["share"]
    assert main([write(tmp_path, spec)]) == 0
    [folder] = (path for path in (tmp_path / "runs" / "try").iterdir() if path.is_dir())
    first = (folder / "metrics.jsonl").read_text()
    assert main([write(tmp_path, spec | {"budget": {"evaluations": 200}})]) == 0
    assert len([path for path in (tmp_path / "runs" / "try").iterdir() if path.is_dir()]) == 1
    later = (folder / "metrics.jsonl").read_text()
    assert later.startswith(first) and len(later) > len(first)
    assert len(list((tmp_path / "results" / "try").glob("plain-*.json"))) == 2  # a record of each budget


def test_a_folder_that_is_beyond_a_smaller_budget_is_not_taken(spec: dict[str, Any], tmp_path: Path) -> None:
    spec = {key: value for key, value in spec.items() if key != "share"}
    spec |= {"methods": {"plain": {"files": [CONFIG]}}, "seeds": [1]}
    path = write(tmp_path, spec | {"budget": {"evaluations": 90}})
    assert (
        main([path, "--only", "plain", "plain"]) == 0
        and main([write(tmp_path, spec | {"budget": {"evaluations": 91}})]) == 0
    )  # as long
    with pytest.raises(
        RunError, match=r"plain-\w+-s1 was begun with a larger budget and is beyond run.max_evaluations=40;"
    ):
        command.compare([write(tmp_path, spec | {"budget": {"evaluations": 40}})])
    assert trained == ["plain1", "plain1"]


def test_the_budget_ends_a_run_not_the_iterations_of_its_files(spec: dict[str, Any], tmp_path: Path) -> None:
    spec = {key: value for key, value in spec.items() if key != "share"}
    spec |= {"methods": {"plain": {"files": [CONFIG]}}, "seeds": [1], "overrides": spec["overrides"][:1]}
    assert load_config(CONFIG)[0].run.iterations == 3 and main([write(tmp_path, spec)]) == 0
    [record] = (tmp_path / "results" / "try").glob("plain-*.json")
    assert json.loads(record.read_text())["totals"]["iterations"] > 3
    [run] = Plan.of(read_spec(write(tmp_path, spec | {"overrides": ["run.iterations=2"]}))).runs(
        "plain", Budget("evaluations", 130)
    )
    assert load_config(run.files, run.settings)[0].run.iterations == 2  # an override is meant


def test_what_failed_is_told_where_nothing_is_finished(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, spec)
    with pytest.raises(
        ConfigError, match="--only small, where the budget of small is a share of the total of plain, which is"
    ):
        command.compare([path, "--only", "small"])
    monkeypatch.setattr(InProcess, "run", lambda self, runs: self.failures.append("plain fell"))
    with pytest.raises(RunError, match="2 runs failed: plain fell; not begun: small, whose budget is a share"):
        command.compare([path])
    for option in ("--evaluations", "--seconds"):
        with pytest.raises(ConfigError, match="but no --seeds"):
            command.compare([path, option, "0"])


def test_a_damaged_record_is_told_before_anything_runs(spec: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, spec)
    [first, second] = Plan.of(read_spec(path)).runs("plain", Budget("evaluations", 130))
    first.record.parent.mkdir(parents=True)
    for run, text, why in (
        (second, "{", "JSONDecodeError"),
        (second, json.dumps({"method": "plain", "seed": 1}), "it is of plain seed 1, not of plain seed 2"),
    ):
        for each in (first, second):
            each.record.write_text(text)
        with pytest.raises(DamagedFile, match=f"{re.escape(str(run.record))} cannot be read .*{why}"):
            read_record(run)
        with pytest.raises(DamagedFile):
            command.compare([path])
    assert trained == []


def test_a_record_of_changed_files_is_named_and_not_taken(spec: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "layer.yaml").write_text("run: {iterations: 50}\n")
    spec |= {"methods": {"plain": {"files": [CONFIG, str(tmp_path / "layer.yaml")]}}, "seeds": [1]}
    path = write(tmp_path, spec)
    [before] = Plan.of(read_spec(path)).runs("plain", Budget("evaluations", 130))
    assert former_record(before) is None
    before.record.parent.mkdir(parents=True)
    overrides = [*before.overrides, before.budget.override]
    before.record.write_text(json.dumps({"method": "plain", "overrides": overrides}))
    (tmp_path / "layer.yaml").write_text("# the same values\nrun: {iterations: 50}\n")
    assert Plan.of(read_spec(path)).runs("plain", Budget("evaluations", 130)) == [before]
    (tmp_path / "layer.yaml").write_text("run: {iterations: 50, ema_decay: 0.5}\n")
    [after] = Plan.of(read_spec(path)).runs("plain", Budget("evaluations", 130))
    assert not is_done(after) and former_record(after) == before.record and is_done(before)


def test_hashes_tell_configurations_apart_but_not_seeds_names_or_budgets_of_folders(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    spec["methods"] = {
        "one": {"files": [CONFIG]},
        "two": {"files": [CONFIG], "overrides": ["run.trackers=[]", "run.keep_checkpoints=3"]},
        "other": {"files": [CONFIG], "overrides": ["trainer.optimizer.lr=1e-5"]},
    }
    plan = Plan.of(read_spec(write(tmp_path, spec | {"baseline": "one"})))
    small, large = Budget("evaluations", 10), Budget("evaluations", 20)
    one, two, other = (plan.runs(name, small)[0] for name in ("one", "two", "other"))
    assert one.config_hash == two.config_hash != other.config_hash == plan.runs("other", small)[1].config_hash
    longer = plan.runs("one", large)[0]
    assert longer.folder == one.folder and longer.config_hash != one.config_hash
    assert plan.runs("one", small)[1].folder.name == one.folder.name.replace("-s1", "-s2")


def test_what_cannot_work_is_said_before_anything_runs(
    spec: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec["methods"]["small"]["overrides"] = ["rollout.gruops=1"]
    with pytest.raises(ConfigError, match=r"method 'small': .*gruops"):
        command.compare([write(tmp_path, spec)])
    spec["methods"]["small"]["overrides"] = ["evaluation.count=3"]
    with pytest.raises(ConfigError, match="'small' and 'plain' differ in evaluation: count is 3 and 4; expected one"):
        command.compare([write(tmp_path, spec)])
    spec["methods"]["small"]["overrides"] = []
    with pytest.raises(ConfigError, match="no run of try is finished"):
        command.compare([write(tmp_path, spec), "--only-report"])
    assert trained == [] and main(["a.yaml", "b.yaml"]) == 2
    assert "no --seeds; expected --seeds 1 2 3" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="got --workres 2"):
        command.compare([write(tmp_path, spec), "--workres", "2"])


SHIPPED = sorted((ROOT / "configs" / "compare").glob("*.yaml"))


def documented() -> list[list[str]]:
    """The arguments of the commands of docs/compare.md."""
    text = (ROOT / "docs" / "compare.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}flowalign compare (.*)$", text, re.M)
    return [shlex.split(line.partition(" #")[0]) for line in lines]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_overrides_of_shipped_comparisons_are_known(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for method in read_spec(str(path)).methods.values():
        assert as_written(method.files, method.overrides)["trainer"]


def check_it_can_be_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration is read, evaluated alike, and has a budget."""
    plans: list[Plan] = []
    monkeypatch.setattr(command, "_run", lambda plan, former, names, workers: plans.append(plan))
    monkeypatch.setattr(command, "records", lambda plan, former: {})
    monkeypatch.setattr(command, "write_results", lambda comparison, found, former: [])
    command.compare(arguments)
    assert all(plan.comparison.methods.keys() == plan.written.keys() for plan in plans) and len(plans) == 1


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which what comparisons need first has been made: images, and the LoRAs of teachers."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    images = shutil.copytree(ROOT / "tests" / "data" / "images", folder / "runs" / "glyphs_images")
    (images / "labeled.jsonl").rename(images / "rendered.jsonl")
    policy = load_policy("glyphs")
    for teacher in ("ocr", "clip"):
        policy.save_lora(folder / "runs" / f"teacher_{teacher}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_comparison_can_be_run(path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared)
    check_it_can_be_run([f"configs/compare/{path.name}"], monkeypatch)


def test_documented_comparisons_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    of_files = [arguments for arguments in documented() if "--with" in arguments]
    assert of_files and all(ROOT / each[0] in SHIPPED for each in documented() if each not in of_files)
    for arguments in of_files:
        check_it_can_be_run(arguments, monkeypatch)
