"""Guards of the doctor: each warns on a pipeline that is made so, with its cure, and is silent on what is shipped."""

import re
from pathlib import Path

import pytest

from flowalign.build import policy_of, task_of
from flowalign.config import load_config
from flowalign.diagnostics.doctor.base import Finding
from flowalign.diagnostics.doctor.guards import check_clip, check_distilled, check_grid, check_guidance, check_noise
from flowalign.errors import ConfigError
from tests.helpers.families import subject

DATA = Path(__file__).parents[1] / "data"
CONFIGS = Path(__file__).parents[2] / "configs"
SIZE = ["policy.height=32", "policy.width=64"]
FLOW = (str(DATA / "tiny.yaml"),)
UNET = (str(DATA / "tiny_sd15.yaml"),)
SD35 = (
    str(CONFIGS / "methods/flow_grpo.yaml"),
    str(CONFIGS / "models/sd35_medium.yaml"),
    str(CONFIGS / "rewards/jpeg.yaml"),
)


def guards(files: tuple[str, ...], *overrides: str) -> dict[str, Finding]:
    config, _ = load_config(files, overrides)
    task = task_of(config, policy_of(config, "cpu"))
    clip = config.trainer.forecast(task.rollout).inspection.clip
    found = (
        check_distilled(config), check_guidance(config, task), check_grid(config, task), check_noise(task),
        check_clip(task, clip),
    )  # fmt: skip
    assert all(finding.ok is True for finding in found)
    return {finding.name: finding for finding in found}


def warned(findings: dict[str, Finding]) -> list[str]:
    assert all(str(finding).startswith("warn" if finding.advice else "ok  ") for finding in findings.values())
    return [name for name, finding in findings.items() if finding.advice]


def flow(name: str, *overrides: str) -> dict[str, Finding]:
    return guards(FLOW, f"policy.path={subject(name).folder}", *SIZE, "trainer.objective.elements=65536", *overrides)


def unet(name: str, *overrides: str) -> dict[str, Finding]:
    own = ["rollout.plan.train_last=false", "rollout.guidance_scale=1", "evaluation.guidance_scale=1"]
    return guards(
        UNET, f"policy.path={subject(name).folder}", *SIZE, "trainer.objective.elements=65536", *own, *overrides
    )


# ------------------------------------------------------------------------------------------ silent


def test_silent_on_the_quickstart() -> None:
    assert warned(guards((str(CONFIGS / "quickstart.yaml"),))) == []


def test_silent_on_flow_grpo_with_the_layer_of_sd35(large_machine: None) -> None:
    findings = guards(SD35, f"policy.path={subject('sd3').folder}")
    assert warned(findings) == []
    # its last stochastic step is that to the nearly empty one; the bound is above what Flow-GRPO's own settings leave
    assert "leaves noise of 0.23" in findings["noise"].figure


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_silent_on_the_few_steps_of_a_distilled_model(steps: int) -> None:
    few = [f"rollout.num_inference_steps={steps}", f"evaluation.num_inference_steps={steps}"]
    assert warned(flow("flux1_schnell", *few, f"rollout.plan.init_args.high={steps - 1}")) == []
    findings = unet("sdxl_turbo", *few)
    assert warned(findings) == [] and findings["grid"].figure.endswith("of a model distilled for 4")


# ------------------------------------------------------------------------------------------ distilled models


def test_more_steps_than_a_model_was_distilled_for() -> None:
    few = "evaluation.num_inference_steps=4"
    for findings in (
        flow("flux1_schnell", "rollout.num_inference_steps=10", few),
        unet("sdxl_turbo", "rollout.num_inference_steps=10", few),
    ):
        assert warned(findings) == ["distilled"]
        assert findings["distilled"].advice.endswith("set rollout.num_inference_steps=4")
        assert "at most 4 (bound 8)" in findings["distilled"].figure
    for name, most in (("flux2_klein", 4), ("z_image_turbo", 8)):
        finding = flow(name, f"rollout.num_inference_steps={2 * most + 1}", few, "policy.lora.targets=null")[
            "distilled"
        ]
        assert finding.advice.endswith(f"set rollout.num_inference_steps={most}")
    for name in ("flux2_klein_base", "z_image"):
        assert not flow(name, "rollout.num_inference_steps=17", few, "policy.lora.targets=null")["distilled"].advice
    assert "distilled" not in warned(flow("flux1_dev", "rollout.num_inference_steps=10", few))
    assert "distilled" not in warned(unet("sdxl", "rollout.num_inference_steps=10", few))


def test_a_name_is_a_hint_and_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "sd35-large-turbo"
    path.symlink_to(subject("sd3").folder)
    finding = guards(FLOW, f"policy.path={path}", *SIZE)["distilled"]
    assert not finding.advice and "whose name says turbo" in finding.figure
    assert "name says" not in flow("sd3")["distilled"].figure


def test_guidance_of_a_model_of_few_steps() -> None:
    few = ["rollout.num_inference_steps=4", "evaluation.num_inference_steps=4"]
    finding = unet("sdxl_turbo", *few, "rollout.guidance_scale=3")["guidance"]
    assert finding.advice.endswith("set rollout.guidance_scale=1")
    assert not unet("sdxl", *few, "rollout.guidance_scale=3")["guidance"].advice


# ------------------------------------------------------------------------------------------ guidance that is an input, or none


def test_a_scale_of_one_where_it_is_an_input() -> None:
    finding = flow("flux1_dev", "evaluation.guidance_scale=3.5")["guidance"]
    assert finding.figure.startswith("embedded") and "set rollout.guidance_scale to" in finding.advice
    both = ["rollout.guidance_scale=3.5", "evaluation.guidance_scale=3.5"]
    assert not flow("flux1_dev", *both)["guidance"].advice
    assert flow("flux1_schnell")["guidance"].figure.startswith("none")


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("flux1_schnell", ["rollout.guidance_scale=3.5"], "rollout.guidance_scale=3.5"),
        ("flux1_schnell", ["evaluation.guidance_scale=3.5"], "evaluation.guidance_scale=3.5"),
        ("flux2_klein", ["evaluation.guidance_scale=4", "policy.lora.targets=null"], "evaluation.guidance_scale=4"),
        ("flux1_schnell", ["policy.negative_prompt=ugly"], "policy.negative_prompt='ugly'"),
        ("flux1_dev", ["policy.negative_prompt=ugly"], "policy.negative_prompt='ugly'"),
        (
            "flux1_dev",
            ["rollout.guidance_scale=3.5", "rollout.detach_uncond=true"],
            "rollout.detach_uncond=true",
        ),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused_before_loading(name: str, overrides: list[str], said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=re.escape(said) + ".*silently do nothing"):
        load_config(FLOW, [f"policy.path={subject(name).folder}", *SIZE, *overrides])


def test_a_guided_teacher_that_ignores_guidance_is_refused(large_machine: None) -> None:
    files = (str(CONFIGS / "methods/cfg_distillation.yaml"), *SD35[1:])
    shared = ["policy.lora.targets=[attn.to_q]", "rollout.guidance_scale=1", "evaluation.guidance_scale=1"]
    load_config(files, [f"policy.path={subject('flux1_dev').folder}", *shared])
    with pytest.raises((ConfigError, ValueError), match=r"trainer\.teachers\.reference\.guidance_scale=4\.5"):
        load_config(files, [f"policy.path={subject('flux1_schnell').folder}", *shared])


# ------------------------------------------------------------------------------------------ grids and noise


def test_four_steps_of_sd3_are_one_jump_and_the_advised_ones_are_not() -> None:
    finding = flow("sd3", "rollout.num_inference_steps=4")["grid"]
    assert "covers 59%" in finding.figure  # diffusers' levels 1, .858, .602, .009, 0
    assert "num_inference_steps=5 of the model's own grid or rollout.schedule=samplers.PlainShift" in finding.advice
    assert not flow("sd3", "rollout.num_inference_steps=5")["grid"].advice
    assert not flow("sd3", "rollout.num_inference_steps=4", "rollout.schedule=samplers.PlainShift")["grid"].advice


def test_a_multistep_solver_without_a_history() -> None:
    plain = ["rollout.num_inference_steps=2", "rollout.schedule={class_path: samplers.PlainShift, init_args: {k: 1}}"]
    plan = ["rollout.plan.init_args.high=1"]
    solver = ["rollout.kernel=samplers.DPMSolver", "rollout.kernel.init_args.kernel=samplers.FlowSDE"]
    assert "no history" in flow("sd3", *plain, *plan, *solver)["grid"].advice
    assert not flow("sd3", *plain, *plan)["grid"].advice


def test_noise_that_a_long_step_leaves() -> None:
    """Of Flow-SDE from σ to σ': √((σ' − p)² + 2p·σ) − σ' with p = a²h/(2(1−σ)), by hand for a = 1.5 from .5 to .25."""
    few = ["rollout.num_inference_steps=4", "rollout.plan=samplers.Chain"]
    findings = flow("flux1_schnell", *few, "rollout.kernel.noise_level=1.5")
    p = 1.5**2 * 0.25 / (2 * 0.5)
    left = ((0.25 - p) ** 2 + 2 * p * 0.5) ** 0.5 - 0.25
    assert warned(findings)[:1] == ["noise"] and f"leaves noise of {left:.2f}" in findings["noise"].figure
    cps = flow("flux1_schnell", *few, "rollout.kernel=samplers.CPS", "trainer.regularizers.kl.form=exact")
    assert "noise" not in warned(cps) and re.search(r"leaves noise of -?0\.00", cps["noise"].figure)


def test_a_window_that_hardly_covers_the_levels() -> None:
    """The last of SD3's steps but one is long, the first of a hundred is short."""
    window = ["rollout.plan.init_args.low=0", "rollout.plan.init_args.high=1"]
    finding = flow("sd3", "rollout.num_inference_steps=100", *window)["noise"]
    assert "hardly differ" in finding.advice
    assert not flow("sd3", "rollout.num_inference_steps=10", *window)["noise"].advice


# ------------------------------------------------------------------------------------------ clip range


def test_a_clip_range_of_other_latents() -> None:
    """4·8·4 elements: √(65536/128) is 22.6 where log-probs are means."""
    path = f"policy.path={subject('sd3').folder}"
    finding = guards(FLOW, path, *SIZE)["clip range"]
    elements = int(re.search(r"for ([\d,]+) elements", finding.figure)[1].replace(",", ""))  # type: ignore[index]
    factor = (65536 / elements) ** 0.5
    assert factor > 3 and f"it means {factor * 1e-3:.1e} here" in finding.advice
    summed = guards(FLOW, path, *SIZE, "rollout.kernel.init_args.reduce=sum")["clip range"]
    assert f"it means {1e-3 / factor:.1e} here" in summed.advice
    for said in (elements, 65536):
        assert not guards(FLOW, path, *SIZE, f"trainer.objective.elements={said}")["clip range"].advice
