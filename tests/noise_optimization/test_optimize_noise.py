"""The call, on small real pipelines: where it starts, what it leaves alone, what it refuses, what it writes."""

import json
import weakref

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import flowalign as fa
from flowalign.glyphs import LOAD_ARGS
from flowalign.models.base import Sampling, Size
from flowalign.noise_optimization import Ascent, Gradient, optimize_noise, read_noise
from rewards import GroupDiversity, ImageStatistics, JPEGCompressibility, Mix
from tests.helpers.linear_policy import LinearPolicy, Nearness
from tests.helpers.tiny import tiny_sd3

PROMPTS = ['the word "KITE" in red on a yellow background', "a word"]
SMALL = Sampling(2, 1.0, Size(24, 48))
FAST = Gradient(Ascent(learning_rate=2.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_sd3(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture
def policy(folder):
    return fa.load_policy(folder, trainable="none", sampling=SMALL)


def brightness(images, prompts):
    """Not differentiable through `FunctionReward`'s spec."""
    return images.mean((1, 2, 3))


def contrast() -> ImageStatistics:
    return ImageStatistics(("contrast",), name="contrast")


def test_the_first_image_is_that_of_generate_and_the_best_is_made_from_the_returned_noise(policy):
    found = optimize_noise(policy, PROMPTS, {contrast(): 10.0}, steps=4, method=FAST, seed=7, progress=False)
    assert torch.equal(found.first_images.pixels, policy.generate(PROMPTS, seed=7).pixels)
    torch.testing.assert_close(
        policy.generate(PROMPTS, noise=found.noise).pixels, found.images.pixels, rtol=0, atol=1e-5
    )
    assert bool((found.total > found.first_total).all())
    torch.testing.assert_close(found.total, 10 * found.history["contrast"].max(0).values)


def test_prompts_are_encoded_once_and_rewards_called_once_an_iteration(policy):
    found = optimize_noise(policy, PROMPTS, contrast(), steps=5, method=FAST, guidance_scale=2.0, progress=False)
    assert policy.encoded == 3  # two prompts and the empty one
    assert found.evaluations == 5 * 2 * 2 * 2 and found.decoded == 10  # iterations, prompts, steps, guidance


@pytest.mark.parametrize("steps", [1, 2])
def test_checkpointing_changes_the_memory_and_not_the_result(policy, steps):
    def run(checkpoint):
        saved = _Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            found = optimize_noise(
                policy, PROMPTS, contrast(), steps=3, method=FAST, num_inference_steps=steps, progress=False,
                checkpoint=checkpoint,
            )  # fmt: skip
        return found, saved

    plain, plain_saved = run(False)
    lean, lean_saved = run(True)
    torch.testing.assert_close(lean.noise, plain.noise, rtol=0, atol=1e-5)
    assert lean.evaluations == plain.evaluations == 3 * 2 * steps  # what is computed again is not counted
    assert lean_saved.peak < 0.7 * plain_saved.peak
    assert not any(part.is_gradient_checkpointing for part in (*policy.networks(), policy.model.vae))


class _Saved:
    """Bytes of what autograd keeps, each storage once, as the largest that lived at a time."""

    def __init__(self):
        self.alive, self.now, self.peak = {}, 0, 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.alive:
            self.alive[storage.data_ptr()] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage.data_ptr(), size)
        return tensor

    def _gone(self, pointer, size):
        self.alive.pop(pointer, None)
        self.now -= size


def test_a_live_pipeline_is_used_with_its_lora_and_left_as_it_was(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **LOAD_ARGS)
    pipeline.transformer.train()
    policy = fa.load_policy(pipeline, lora=fa.LoRA(rank=2), sampling=SMALL)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.normal_(std=0.3)
    pipeline.transformer.train().requires_grad_(True)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    found = optimize_noise(pipeline, PROMPTS, contrast(), steps=3, method=FAST, num_inference_steps=2, size=Size(24, 48),
                           guidance_scale=1.0, progress=False)  # fmt: skip
    assert torch.equal(found.first_images.pixels, policy.generate(PROMPTS).pixels)  # of the LoRA
    plain = fa.load_policy(folder, trainable="none", sampling=SMALL).generate(PROMPTS)
    assert not torch.allclose(found.first_images.pixels, plain.pixels, atol=1e-3)
    assert pipeline.transformer.training and all(p.requires_grad for p in pipeline.transformer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pipeline.transformer.state_dict().items())


def test_last_steps_and_detach_uncond_change_the_gradient_and_not_the_values(policy):
    def run(**settings):
        method = Gradient(Ascent(learning_rate=2.0), **settings)
        return optimize_noise(
            policy, PROMPTS[0], contrast(), steps=2, method=method, guidance_scale=3.0, progress=False
        )

    full, last, cond = run(), run(last_steps=1), run(detach_uncond=True)
    assert torch.equal(full.history["total"][0], last.history["total"][0])
    # detach_uncond calls the network once for each half: another batch, which may round otherwise
    torch.testing.assert_close(full.history["total"][0], cond.history["total"][0], rtol=1e-5, atol=0)
    assert len({found.history["norm"][1].item() for found in (full, last, cond)}) == 3


def test_warm_start_goes_on_from_the_noise_that_was_saved(policy, tmp_path):
    first = optimize_noise(policy, PROMPTS, contrast(), steps=3, method=FAST, progress=False)
    place = first.save(tmp_path / "found")
    again = optimize_noise(policy, PROMPTS, contrast(), steps=3, method=FAST, start=read_noise(place), progress=False)
    assert torch.equal(again.start, first.noise)
    torch.testing.assert_close(again.first_total, first.total)
    assert bool((again.total >= first.total - 1e-6).all())


def test_held_out_rewards_score_the_first_and_the_best_image(policy):
    found = optimize_noise(
        policy, PROMPTS, contrast(), steps=3, method=FAST, held_out=[brightness, JPEGCompressibility()], progress=False
    )
    first, best = found.held_out["brightness"]
    torch.testing.assert_close(first, brightness(found.first_images.pixels, PROMPTS))
    torch.testing.assert_close(best, brightness(found.images.pixels, PROMPTS))
    assert set(found.held_out) == {"brightness", "jpeg_compressibility"} and "brightness" not in found.history


def test_what_is_saved_can_be_read(policy, tmp_path):
    found = optimize_noise(policy, PROMPTS, contrast(), steps=3, method=FAST, held_out=[brightness], progress=False)
    folder = found.save(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        "first-0.png", "first-1.png", "image-0.png", "image-1.png", "noise.safetensors", "progress.png", "result.json",
    ]  # fmt: skip
    content = json.loads((folder / "result.json").read_text())
    assert content["prompts"] == PROMPTS and content["num_inference_steps"] == 2
    assert content["total"] == pytest.approx(found.total.tolist())
    assert [len(content["history"][name]) for name in ("total", "contrast", "norm")] == [3, 3, 3]
    assert torch.equal(read_noise(folder), found.noise)
    again = optimize_noise(policy, PROMPTS[0], contrast(), steps=2, method=FAST, progress=False)
    again.save(folder)  # in the place of the former one
    assert sorted(path.name for path in folder.glob("*.png")) == ["first.png", "image.png", "progress.png"]
    assert torch.equal(read_noise(folder), again.noise)
    with pytest.raises(FileNotFoundError, match="expected the folder of a saved result"):
        read_noise(tmp_path)
    assert repr(found).startswith("NoiseResult of 2 prompts: mean total ") and len(repr(found.images)) < 200
    assert (folder / "progress.png").read_bytes().startswith(b"\x89PNG") and found._repr_png_().startswith(b"\x89PNG")


def test_weights_add_up_and_zero_ones_decide_nothing():
    """Σ wᵢrᵢ; a reward of weight 0 is measured, and may lack a gradient."""
    y = torch.ones(4)
    one, two = Nearness(y, name="one"), Nearness(-y, name="two")
    watched = Nearness(3 * y, differentiable=False, unscorable="a", name="watched")
    policy = LinearPolicy(torch.eye(4))
    found = optimize_noise(policy, "a", {one: 2.0, two: 0.5, watched: 0.0}, steps=3, progress=False)
    assert bool(found.history["watched"].isnan().all()) and len(watched.asked) == 3
    expected = 2 * found.history["one"] + 0.5 * found.history["two"]
    torch.testing.assert_close(found.history["total"], expected)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rewards": {JPEGCompressibility(): 1.0}}, "jpeg_compressibility, which has no gradient, with Gradient"),
        ({"rewards": []}, "of which one at least is not 0"),
        ({"rewards": {contrast(): float("nan")}}, "expected finite ones"),
        ({"rewards": [contrast(), contrast()]}, "expected different names"),
        ({"rewards": [contrast()], "held_out": [contrast()]}, "expected different names"),
        ({"rewards": [GroupDiversity(near=0.3)]}, "which scores groups"),
        ({"prompts": []}, "got 0 prompts"),
        ({"steps": 0}, "expected at least 1 of each"),
        ({"patience": 0}, "expected at least 1 of each"),
        ({"prompts": [3]}, "expected a text"),
        ({"method": "spsa"}, "expected an object such as method=fa.SPSA"),
        ({"start": "kite"}, "read_noise"),
        ({"held_out": brightness}, "put it into brackets"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(settings, match):
    arguments = {"prompts": "a", "rewards": contrast(), **settings}
    with pytest.raises((ValueError, TypeError), match=match):
        optimize_noise("/no/such/pipeline", **arguments)


def test_start_noise_of_another_shape_is_refused():
    with pytest.raises(
        ValueError,
        match=r"got start noise \[1, 1, 1, 5\]; expected finite numbers, no latent all zeros, \[1, 1, 1, 4\]",
    ):
        optimize_noise(LinearPolicy(torch.eye(4)), "a", Nearness(torch.ones(4)), start=torch.ones(1, 1, 1, 5))
    with pytest.raises(ValueError, match="no latent all zeros"):  # no direction in which its norm could grow
        optimize_noise(LinearPolicy(torch.eye(4)), "a", Nearness(torch.ones(4)), start=torch.zeros(1, 1, 1, 4))


def test_a_mix_is_one_reward_and_channels_add_up(policy):
    mix = Mix([contrast(), ImageStatistics(("edges",), name="edges")], weights=[1.0, 2.0])
    found = optimize_noise(policy, PROMPTS[0], mix, steps=2, method=FAST, progress=False)
    assert set(found.history) == {"total", "mix", "norm"}
    both = ImageStatistics(("contrast", "edges"), name="both")
    found = optimize_noise(policy, PROMPTS[0], both, steps=2, method=FAST, progress=False)
    total = found.history["both/contrast"] + found.history["both/edges"]
    torch.testing.assert_close(found.history["total"], total)
