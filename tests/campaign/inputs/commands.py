"""The command line, prompt files, and combinations of settings that cannot work."""

from __future__ import annotations

from tests.campaign.case import Case

RGB = b"P6 2 2 255\n" + bytes(12)


def words(*arguments: str, says: str = "", fine: bool = False) -> Case:
    return Case(" ".join(arguments) or "nothing", arguments=arguments, says=says, fine=fine)


def prompts(name: str, content: str | bytes, says: str = "mine", *, suffix: str = "txt", fine: bool = False) -> Case:
    file = f"mine.{suffix}"
    return Case(f"prompts: {name}", (f"prompts={file}",), {file: content, "picture.ppm": RGB}, says=says, fine=fine)


def lines(name: str, content: str | bytes, says: str = "mine", *, fine: bool = False) -> Case:
    return prompts(name, content, says, suffix="jsonl", fine=fine)


def setting(*overrides: str, says: str, fine: bool = False) -> Case:
    return Case(" ".join(overrides), overrides, says=says, fine=fine)


HELD = "evaluation.prompts="
CASES = [
    words(says="usage"),
    words("--help", fine=True),
    words("help", says="help|usage"),
    words("trian", "tiny.yaml", says="train"),
    words("tiny.yaml", says="train|command"),
    words("train", says="usage"),
    words("train", "--help", fine=True),
    words("train", "tiny.yml", says="tiny.yml"),
    words("train", "tiny.yaml", "--iterations", "3", says="iterations"),
    words("train", "--config", "tiny.yaml", says="config"),
    words("train", "run.seed=1", says="configuration file"),
    words("train", "run.seed=1", "tiny.yaml", says="before the overrides"),
    words("train", "tiny.yaml", "tiny.yaml", fine=True),
    words("train", "tiny.yaml", "--verbose", says="verbose"),
    words("train", "tiny.yaml", "seed", says="seed"),
    words("train", "tiny.yaml", "run.name=a/b", says="run.name"),
    words("train", "tiny.yaml", "run.name=", says="run.name"),
    words("train", "tiny.yaml", "run.name=..", says="run.name"),
    words("train", "tiny.yaml", "run.name=" + "x" * 300, says="name|long"),
    words("train", "tiny.yaml", "run.output=/proc/nothing", says="/proc/nothing"),
    words("train", "tiny.yaml", "run.output=tiny.yaml", says="tiny.yaml"),
    words("train", "tiny.yaml", "run.trackers=[mlflow]", says="trackers"),
    words("train", "tiny.yaml", "run.trackers=[wandb]", says="wandb"),
    words("doctor", says="usage"),
    words("doctor", "nothing.yaml", says="nothing.yaml"),
    words("doctor", "tiny.yaml", "run.sed=1", says="seed"),
    words("benchmark", says="usage"),
    words("benchmark", "nothing.yaml", says="nothing.yaml"),
    words("benchmark", "tiny.yaml", "--iterations", "many", says="iterations"),
    words("benchmark", "tiny.yaml", "--variants", "nothing", says="nothing"),
    words("benchmark", "tiny.yaml", "--speed", "3", says="speed"),
    prompts("two lines", "a fox\na hen\n", "", fine=True),
    prompts("a byte order mark", "\ufeffa fox\na hen\n", "", fine=True),
    prompts("other alphabets", "ein Füchslein\n狐\n🦊\n", "", fine=True),
    prompts("empty lines between", "\n\na fox\n\n\na hen\n", "", fine=True),
    prompts("empty", ""),
    prompts("only spaces", "  \n\t\n"),
    prompts("binary", b"\xff\xfe\x00\x01" * 40),
    prompts("utf-16", "a fox\n".encode("utf-16")),
    prompts("a huge line", "a fox " * 200_000, "10,000"),
    prompts("a csv", "prompt\na fox\n", suffix="csv"),
    prompts("without a suffix", "a fox\n", suffix="prompts"),
    Case("prompts: not there", ("prompts=none.txt",), says="none.txt"),
    Case("prompts: a folder", ("prompts=pipeline",), says="pipeline"),
    Case("prompts: a folder with a suffix", ("prompts=folder.txt",), {"folder.txt/a": ""}, says="folder.txt"),
    Case("prompts: a module that is not there", ("prompts=no_such:prompts",), says="no_such"),
    Case("prompts: a function that is not there", ("prompts=flowalign.glyphs:nothing",), says="nothing"),
    Case("prompts: no function", ("prompts=math:pi",), says="pi"),
    Case("prompts: a function of another kind", ("prompts=os:getcwd",), says="getcwd"),
    Case("prompts: a function that raises", ("prompts=mine:prompts",), {"mine.py": "def prompts():\n    raise OSError('no disk')\n"}, says="no disk"),
    Case("prompts: a function that exits", ("prompts=mine:prompts",), {"mine.py": "import sys\ndef prompts():\n    sys.exit(0)\n"}, says="mine"),
    Case("prompts: a function of texts", ("prompts=mine:prompts",), {"mine.py": "def prompts():\n    return ['a fox']\n"}, fine=True),
    Case("prompts: a function of yours", ("prompts=mine:prompts",), {"mine.py": "def prompts():\n    return [{'prompt': 'a fox'}]\n"}, fine=True),
    lines("good", '{"prompt": "a fox", "animal": "fox"}\n', "", fine=True),
    lines("cut short", '{"prompt": "a fox"\n'),
    lines("a list", '["a fox"]\n'),
    lines("a text", '"a fox"\n'),
    lines("null", "null\n"),
    lines("no prompt", '{"text": "a fox"}\n', "prompt"),
    lines("an empty prompt", '{"prompt": ""}\n', "prompt"),
    lines("a number as prompt", '{"prompt": 3}\n', "prompt"),
    lines("null as prompt", '{"prompt": null}\n', "prompt"),
    lines("a list as prompt", '{"prompt": ["a", "fox"]}\n', "prompt"),
    lines("several lines of one object", '{\n"prompt": "a fox"\n}\n'),
    lines("NaN", '{"prompt": "a fox", "weight": NaN}\n', "NaN|mine"),
    lines("deep", '{"prompt": "a fox", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n"),
    lines("an image that is not there", '{"prompt": "a fox", "image": "none.png"}\n', "none.png"),
    lines("an image that is none", '{"prompt": "a fox", "image": "mine.jsonl"}\n', "mine.jsonl"),
    lines("image and images", '{"prompt": "a fox", "image": "picture.ppm", "images": []}\n', "images"),
    lines("images that are a number", '{"prompt": "a fox", "images": 3}\n', "images"),
    lines("a negative prompt that is a number", '{"prompt": "a fox", "negative_prompt": 3}\n', "negative_prompt"),
    lines("a key twice", '{"prompt": "a fox", "prompt": "a hen"}\n', "prompt|twice"),
    setting(HELD + "held_out.txt", says="", fine=True),
    setting("prompts=train.txt", HELD + "train.txt", says="held-out|training|evaluation.prompts"),
    setting(HELD + "none.txt", says="none.txt"),
    setting(HELD + "held_out.txt", "evaluation.count=3", says="evaluation.count"),
    setting("policy.trainable=none", says="trainable"),
    setting("policy.trainable=full", says="reference"),
    setting("policy.dtype=fp8", says="dtype"),
    setting("policy.frames=2", says="frames"),
    setting("policy.offload=[transformer]", says="offload"),
    setting("rollout.detach_uncond=true", says="guidance"),
    setting("rollout.guidance_scale=3", says="guidance|allow_cfg"),
    setting("rollout.guidance_scale=0.5", says="guidance_scale"),
    setting("rollout.group_size=1", says="group_size"),
    setting("rollout.draw=never", says="draw"),
    setting("rollout.kernel=samplers.ODE", says="noise"),
    setting("rollout.kernel=samplers.DDIM", says="DDIM|flow"),
    setting("rollout.plan=samplers.Deterministic", says="stochastic"),
    setting("rollout.sources={teacher: nobody}", says="sources|nobody"),
    setting("trainer.anchor=none", says="anchor"),
    setting("trainer.regularizers.kl.role=nobody", says="nobody"),
    setting("trainer.signal.credit=flowalign.credit.Gain", says="Probed"),
    setting("trainer.signal.advantage={class_path: flowalign.advantage.Normalized, init_args: {within: planet}}", says="within|planet"),
    setting("trainer.signal.select=flowalign.credit.Broadcast", says="Broadcast"),
    setting("trainer.objective=flowalign.objectives.Uniform", says="Uniform"),
    setting("trainer=flowalign.trainers.Nothing", says="Nothing|trainer"),
    setting("trainer=flowalign.trainers.PolicyGradient", says="", fine=True),
    setting("process_rewards=[rewards.JPEGCompressibility]", says="process_rewards"),
    setting("policy.lora.dropout=0.1", says="dropout"),
    setting("policy.roles={reference: {}}", says="reference"),
    setting("policy.roles={old: {update: sometimes}}", says="update|sometimes"),
]  # fmt: skip
