"""The shipped configurations: every layer combines with every other, and the quickstart is a complete file."""

from dataclasses import asdict
from functools import cache, reduce
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowalign.config import TrainConfig, load_config
from flowalign.config.layers import merge, read_layer
from flowalign.config.settings import RunSettings
from flowalign.data import load_prompts
from flowalign.errors import ConfigError
from flowalign.glyphs.video.process_reward import GlyphsVideoProcessReward
from flowalign.models.checks import rows_per_state
from flowalign.objectives import Transitions
from flowalign.run.preflight import forecast
from rewards import RewardBatch, score, spec_of
from samplers import FlowSDE
from tests.helpers.families import subject
from tests.helpers.method_layers import BY_REWARD_GRADIENT, METHODS, ON_GLYPHS, class_of, reward_of
from tests.helpers.recipe_files import RECIPE_REWARDS

FOLDER = Path(__file__).parents[2] / "configs"
MODELS, REWARDS = (
    sorted({path.stem for path in (FOLDER / kind).glob("*.yaml")} - RECIPE_REWARDS) for kind in ("models", "rewards")
)
# the rewards of images alone: of an edit, prompts have source images; of a video, models have frames
OF_IMAGES = [name for name in REWARDS if not {"edit", "video"} & set(name.split("_"))]
# steps that are few of the grid are refused with guidance, unless allow_cfg_update
FEW_STEPS = {
    "flow_grpo_fast", "mixgrpo", "mixgrpo_flash", "mixgrpo_flash_star", "branchgrpo_mix", "dynamic_treerpo", "flash_grpo",
    "preview_select",
}  # fmt: skip
KL_OF_FLOWS = {
    "flow_grpo",
    "flow_grpo_fast",
    "densegrpo",
    "preview_select",
    "parm_select",
}  # form exact_times_h is that of an SDE
# model layer of videos -> tiny pipeline in its place; one of texts where prompts would need images
VIDEOS = {
    "hunyuan_video": "hunyuan_video", "ltx_video": "ltx_video", "wan21_1_3b": "wan21", "wan21_14b": "wan21", "wan21_i2v": "wan21",
    "wan22": "wan22", "wan22_5b": "wan22_5b", "wan22_i2v": "wan21", "glyphs_video": "glyphs-video",
}  # fmt: skip
WAN = ("wan21_1_3b", "wan21_14b", "wan21_i2v", "wan22", "wan22_i2v")
# what a layer of rewards of images needs with them, of which one then stands for all
ON_FRAMES = (
    "reward={class_path: rewards.OnFrames, init_args: {reward: {class_path: rewards.CLIPScore, init_args: {model: glyphs}}}}",
    "evaluation.rewards=[rewards.VideoStatistics]",
)
FORWARD_PROCESS = "flowalign.trainers.ForwardProcess"
DISCRETE = {"sd15", "sd21", "sdxl", "sdxl_turbo"}  # ε- and v-models, whose chain (DDIM) takes the place of the method's
IN_FEW_STEPS = {"sdxl_turbo": 50, "glyphs_video": 20}  # few plans of the methods fit, so more are taken here
# (method, model) -> what is said of those that never go together
REFUSED: dict[tuple[str, str], str] = {
    **{("srpo", model): "expected a rectified flow" for model in DISCRETE},
    **{("tdm_r1", model): "has the guidance in its weights" for model in DISCRETE},
    ("tdm_r1", "sdxl_turbo"): "expected Euler's steps of a rectified flow",
    # the images of these methods' tests have Glyphs' size
    **{
        (method, model): f"multiples of {unit}"
        for method in ("fm_sft", "diffusion_dpo_offline")
        for model, unit in (
            ("hunyuan_video", 16),
            ("ltx_video", 32),
            ("wan22_5b", 32),
            ("glyphs_video", 16),
            *((wan, 16) for wan in WAN),
        )
    },
}
# (method, model) of other trainers -> {override: what is said without it}, in the order in which they are refused
NEEDED: dict[tuple[str, str], dict[str, str]] = {
    ("tdm_r1", model): {"rollout.guidance_scale=1": "has the guidance in its weights"}
    for model in MODELS
    if model not in DISCRETE and not model.startswith("glyphs")
}

# what the complete files glyphs_flow_grpo, glyphs_flow_grpo_fast and sd15_ddpo said before they became layers
GLYPHS = {
    "prompts": "flowalign.glyphs:train_prompts",
    "policy.height": 24,
    "policy.width": 48,
    "policy.dtype": "fp32",
    "policy.lora.rank": 32,
    "policy.lora.alpha": 64,
    "policy.lora.targets": [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
        "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    ],
    "rollout.groups": 8,
    "rollout.group_size": 24,
    "rollout.num_inference_steps": 10,
    "rollout.guidance_scale": 1.0,
    "rollout.kernel.class_path": "samplers.FlowSDE",
    "rollout.kernel.noise_level": 0.7,
    "reward.class_path": "rewards.OCR",
    "reward.metric": "edit",
    "reward.fold": {"0": "O"},
    "trainer.signal.advantage.std": "batch",
    "trainer.objective.clip_range": 1e-4,
    "trainer.objective.elements": 65_536,
    "trainer.regularizers.kl.beta": 0.04,
    "trainer.regularizers.kl.form": "exact_times_h",
    "trainer.updates_per_rollout": 2,
    "trainer.micro_batch": 16,
    "trainer.optimizer.lr": 3e-4,
    "evaluation.prompts": "flowalign.glyphs:held_out_prompts",
    "evaluation.count": 256,
    "evaluation.num_inference_steps": 6,
    "evaluation.guidance_scale": 1.0,
    "evaluation.batch_size": 64,
}  # fmt: skip
BEFORE: dict[tuple[str, str, str], dict[str, Any]] = {
    ("flow_grpo", "glyphs", "ocr_glyphs"): {
        **GLYPHS, "rollout.plan.class_path": "samplers.Chain", "rollout.plan.shared_start": False,
        "rollout.plan.train_last": False,
    },
    ("flow_grpo_fast", "glyphs", "ocr_glyphs"): {
        **GLYPHS, "rollout.plan.class_path": "samplers.Window", "rollout.plan.shared_start": False,
        "rollout.plan.size": 2, "rollout.plan.low": 0, "rollout.plan.high": 9,
    },
    ("ddpo", "sd15", "jpeg"): {
        "prompts": "configs/prompts/animals.txt",
        "policy.height": 512,
        "policy.width": 512,
        "policy.dtype": "bf16",
        "policy.lora.rank": 4,
        "policy.lora.alpha": 4,
        "policy.lora.targets": ["to_q", "to_k", "to_v", "to_out.0"],
        "rollout.groups": 16,
        "rollout.group_size": 8,  # was 16: they would fill the 16 entries of PromptTracker alone
        "rollout.num_inference_steps": 50,
        "rollout.guidance_scale": 5.0,
        "rollout.micro_batch": 16,
        "rollout.plan.class_path": "samplers.Chain",
        "rollout.plan.shared_start": False,
        "rollout.plan.train_last": True,
        "rollout.kernel.class_path": "samplers.DDIM",
        "rollout.kernel.eta": 1.0,
        "reward.class_path": "rewards.JPEGCompressibility",
        "reward.divide_by": 1.0,
        "trainer.signal.advantage.class_path": "flowalign.advantage.PromptTracker",
        "trainer.signal.advantage.size": 16,
        "trainer.objective.clip_range": 1e-4,
        "trainer.objective.elements": 16_384,
        "trainer.regularizers": {},
        "trainer.updates_per_rollout": 4,
        "trainer.micro_batch": 8,
        "trainer.optimizer.lr": 3e-4,
        "evaluation.prompts": "configs/prompts/animals.txt",
        "evaluation.count": 45,
        "evaluation.num_inference_steps": 50,
        "evaluation.guidance_scale": 5.0,
        "evaluation.batch_size": 16,
    },
}  # fmt: skip


@pytest.fixture
def tiny(tiny_pipeline: Path, tiny_sd15_pipeline: Path, large_machine: None) -> dict[str, str]:
    """Model layer -> an override that puts a tiny pipeline in its place: of SD3, or of its family where that makes a difference."""
    own = {**VIDEOS, "glyphs_edit": "glyphs-edit", **{model: model for model in DISCRETE - {"sd15"}}}
    folders = {"sd15": str(tiny_sd15_pipeline), **{layer: subject(name).folder for layer, name in own.items()}}
    return {model: f"policy.path={folders.get(model, str(tiny_pipeline))}" for model in MODELS}


def files(method: str, model: str, reward: str) -> list[str]:
    return [f"configs/methods/{method}.yaml", f"configs/models/{model}.yaml", f"configs/rewards/{reward}.yaml"]


def flat(plain: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, `init_args` left out; mappings stand under their own key too."""
    found = {prefix: plain} if prefix else {}
    for key, value in plain.items() if isinstance(plain, dict) else ():
        found |= flat(value, prefix if key == "init_args" else f"{prefix}.{key}".strip("."))
    return found


def load(model: str, paths: list[str], tiny: dict[str, str], *overrides: str) -> tuple[TrainConfig, dict[str, Any]]:
    return loaded(tuple(paths), (tiny[model], *overrides))


loaded = cache(load_config)


@pytest.mark.parametrize("layers", BEFORE, ids="-".join)
def test_layers_say_what_the_complete_files_said(layers: tuple[str, str, str], tiny: dict[str, str]) -> None:
    _, plain = load(layers[1], files(*layers), tiny)
    values = flat(plain)
    assert {key: values[key] for key in BEFORE[layers]} == BEFORE[layers]
    defaults = asdict(RunSettings(name=plain["run"]["name"]))
    assert plain["run"] == defaults, "a layer says nothing of the run"
    assert plain["run"]["name"] == "-".join(layers)
    assert [flat(reward)["class_path"] for reward in plain["evaluation"]["rewards"]] == [values["reward.class_path"]]
    for part in ("signal.credit", "signal.select", "objective", "step_weight"):
        assert values[f"trainer.{part}.class_path"].rpartition(".")[2] in (
            "Broadcast", "AllEdges", "ClippedRatio", "Uniform",
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("method", "model"), product(METHODS, MODELS))
def test_all_layers_combine(method: str, model: str, tiny: dict[str, str]) -> None:
    more = [f"rollout.num_inference_steps={IN_FEW_STEPS[model]}"] if model in IN_FEW_STEPS else []
    more += ON_FRAMES if model in VIDEOS else ()
    if (method, model) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[method, model]):
            load(model, files(method, model, reward_of(method)), tiny, *ON_GLYPHS.get(method, ()), *more)
        return
    needed = dict(NEEDED.get((method, model), {}))
    if method in KL_OF_FLOWS and model in DISCRETE:
        needed["trainer.regularizers.kl.form=exact"] = r"regularizers\.kl: .*form=exact"
    if method == "dynamic_treerpo" and model in DISCRETE:  # the best leaf's velocity is that of a flow
        needed["trainer.supervision.layer_tuning.target=best_path_velocity"] = "take best_path_velocity"
    scale = content(f"configs/models/{model}.yaml")["rollout"].get("guidance_scale", 1.0)
    if (
        model == "hunyuan_video"
        and content(f"configs/methods/{method}.yaml")["trainer"].get("class_path") == FORWARD_PROCESS
    ):
        needed[f"trainer.guidance_scale={scale}"] = (
            "another velocity would be trained than samples"  # the scale is an input
        )
    if method in FEW_STEPS and rows_per_state(tiny[model].removeprefix("policy.path="), scale) > 1:
        needed["rollout.allow_cfg_update=true"] = rf"allow_cfg_update=true.*{model}\.yaml, line"
    if method == "dynamic_treerpo" and model in DISCRETE:  # 1.5 times η = 1 would be more noise than there is
        needed["rollout.kernel.eta=0.6"] = "lower the level"
    if method == "densegrpo" and model in DISCRETE:  # so would any level above 1 be
        needed["trainer.calibration.highest=1.0"] = "Lower highest"
    for reward in ["clip_glyphs"] if model in VIDEOS else ["edit_glyphs"] if model == "glyphs_edit" else OF_IMAGES:
        paths = files(method, model, reward)
        given = [*ON_GLYPHS.get(method, ()), *more]
        if method in BY_REWARD_GRADIENT and not has_gradient(model, reward, tiny):
            with pytest.raises(ConfigError, match=r"gradient|differentiable"):
                load(model, paths, tiny, *given, *needed)
            continue
        for override, refusal in needed.items():
            with pytest.raises(ConfigError, match=refusal):
                load(model, paths, tiny, *given)
            given.append(override)
        config, _ = load(model, paths, tiny, *given)
        assert config.run.name == f"{method}-{model}-{reward}" and config.run.iterations > 0


def has_gradient(model: str, reward: str, tiny: dict[str, str]) -> bool:
    reader = model if model == "glyphs_edit" else "glyphs"  # of the prompts, which have source images there
    return load(reader, files("flow_grpo", reader, reward), tiny)[0].reward.spec.differentiable


layer = cache(read_layer)


def content(path: str, *later: str) -> Any:
    """Files as one, as plain data."""
    return yaml.SafeLoader("").construct_document(reduce(merge, map(layer, later), layer(path)))


@pytest.mark.parametrize(("method", "model"), product(METHODS, MODELS))
def test_only_layers_that_replace_kernel_or_schedule_depend_on_the_order(method: str, model: str) -> None:
    """Its chain takes the place of the method's kernel, and the grid of others that of the method's, so they come after the method, as
    does a layer with a process reward, which takes the place of the method's. All other orders give the same."""
    for reward in REWARDS:
        layers = files(method, model, reward)
        orders = permutations(layers)
        merged = [
            content(*order)
            for order in orders
            if ("schedule" not in content(layers[1])["rollout"] or order.index(layers[0]) < order.index(layers[1]))
            and ("process_rewards" not in content(layers[2]) or order.index(layers[0]) < order.index(layers[2]))
        ]
        assert all(each == merged[0] for each in merged[1:])
        kernel = "samplers.DDIM" if model in DISCRETE else class_of(content(layers[0])["rollout"]["kernel"])
        assert class_of(merged[0]["rollout"]["kernel"]) == kernel


def test_the_layer_of_stable_diffusion_1_5_before_the_method_is_refused(tiny: dict[str, str]) -> None:
    method, model, reward = files("flow_grpo", "sd15", "jpeg")
    with pytest.raises(ConfigError, match="DDIM"):
        load("sd15", [model, method, reward], tiny)


def test_a_scale_of_siblings_noise_is_refused_where_no_state_has_two_stochastic_steps(tiny: dict[str, str]) -> None:
    load("glyphs", files("branchgrpo", "glyphs", "ocr_glyphs"), tiny)
    with pytest.raises(ConfigError, match=r"branch_scale=2\.0 .*in which no two stochastic steps leave one state"):
        load("glyphs", files("rvm", "glyphs", "ocr_glyphs"), tiny, "rollout.branch_scale=2.0")


@pytest.mark.parametrize(("elements", "clip_range"), [(3456, 4.4e-4), (65_536, 1e-4), (262_144, 5e-5)])
def test_the_clip_range_of_flow_grpo_is_scaled_by_the_size_of_the_latents(
    elements: int, clip_range: float, tiny: dict[str, str]
) -> None:
    """Glyphs, SD3.5 at 512×512 and at 1024×1024."""
    config, _ = load("glyphs", files("flow_grpo", "glyphs", "ocr_glyphs"), tiny)
    states = torch.zeros(1, elements)
    step = FlowSDE(0.7)(states, states, 0.5, 0.4)
    limit = config.trainer.objective.drift_limit(Transitions(step, states))
    assert float(limit) == pytest.approx(clip_range, rel=0.02)


@pytest.mark.parametrize("reward", ["clip_glyphs", "color_glyphs", "jpeg"])
def test_a_reward_can_score_its_own_prompts(reward: str, tiny: dict[str, str]) -> None:
    config, _ = load("glyphs", files("flow_grpo", "glyphs", reward), tiny)
    for judge, source in ((config.reward, config.prompts), (config.evaluation.rewards[0], config.evaluation.prompts)):
        records = load_prompts(source)[:2]
        images = torch.rand(2, 3, 24, 48, generator=torch.Generator().manual_seed(0))
        batch = RewardBatch(
            prompts=[record.prompt for record in records],
            images=images,
            metadata=[record.metadata for record in records],
        )
        assert bool(score(judge, batch).valid.all()), judge.name


@pytest.mark.parametrize("reward", ["ocr_glyphs_video", "color_glyphs_video", "actions_glyphs_video"])
def test_rewards_of_glyphs_video_go_with_a_model_of_videos(reward: str, tiny: dict[str, str]) -> None:
    config, _ = load("wan21_1_3b", files("flow_grpo", "wan21_1_3b", reward), tiny)
    assert {spec_of(judge).inputs for judge in (config.reward, *config.evaluation.rewards)} == {("videos",)}
    names = ["ocr_exact", "color_first", "color_last", "actions_held_out", "motion", "video"]
    assert [judge.name for judge in config.evaluation.rewards] == names


def test_euphonium_on_glyphs_video_is_guided_by_the_process_reward_of_its_world() -> None:
    """The later half of its eight steps, with the outcome of ocr_glyphs_video, and distilled."""
    paths = [*files("euphonium", "glyphs_video", "ocr_glyphs_video"), "configs/rewards/process_glyphs_video.yaml"]
    config, plain = load_config(paths, [])
    guidance = config.rollout.reward_guidance
    assert guidance is not None and guidance.judge(config.process_rewards) == GlyphsVideoProcessReward()
    assert config.reward.name == "ocr" and spec_of(config.reward).inputs == ("videos",)
    values = flat(plain)
    assert values["rollout.reward_guidance.start"] == values["trainer.signal.credit.parts.process.start"] == 4
    assert [name for name, part in config.trainer.supervision.items() if part.needs_guidance] == ["distill"]
    assert "at most 4.00 more scores per image" in forecast(config)


def test_the_recipe_of_stable_diffusion_3_5_is_that_of_flow_grpo(tiny: dict[str, str]) -> None:
    """2505.05470 and its code: 48 × 24 images, 10 steps to train, 40 to evaluate, guidance 4.5, LoRA 32/64, β .04."""
    _, plain = load("sd35_medium", files("flow_grpo", "sd35_medium", "ocr_glyphs"), tiny)
    values = flat(plain)
    expected = {
        "rollout.groups": 48, "rollout.group_size": 24, "rollout.num_inference_steps": 10,
        "rollout.guidance_scale": 4.5, "rollout.kernel.noise_level": 0.7, "evaluation.num_inference_steps": 40,
        "evaluation.guidance_scale": 4.5, "policy.height": 512, "policy.lora.rank": 32, "policy.lora.alpha": 64,
        "policy.lora.targets": None, "trainer.optimizer.lr": 3e-4, "trainer.objective.clip_range": 1e-4,
        "trainer.regularizers.kl.beta": 0.04, "trainer.signal.advantage.clip": 5.0, "trainer.optimizer.weight_decay": 1e-4,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert (
        yaml.safe_load(Path("configs/models/sd35_medium.yaml").read_text())["policy"]["path"]
        == "stabilityai/stable-diffusion-3.5-medium"
    )


@pytest.mark.parametrize(
    ("name", "layer", "reward"), [("quickstart", "clip", "clip_score"), ("glyphs_trees", "color", "color")]
)
def test_complete_files_take_layers(name: str, layer: str, reward: str, tiny_pipeline: Path) -> None:
    path, file = f"policy.path={tiny_pipeline}", f"configs/{name}.yaml"
    config, plain = load_config(file, [path])
    assert config.run.name == name and plain == load_config([file], [path])[1]
    changed, _ = load_config([file, f"configs/rewards/{layer}_glyphs.yaml"], [path])
    assert changed.reward.name == reward and changed.rollout == config.rollout
    assert changed.evaluation.count == 256
