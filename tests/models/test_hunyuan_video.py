"""What HunyuanVideo does beside the contract of all families: embedded guidance, its template, and networks that it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.models import load_policy
from flowalign.models.checks import check_image_size
from tests.helpers.families import subject


def test_the_guidance_scale_is_an_input_of_the_network_and_a_state_one_row() -> None:
    family = subject("hunyuan_video")
    policy, seen = family.policy(trainable="none"), []
    policy.modules()["transformer"].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["guidance"].tolist()), with_kwargs=True
    )
    conditions = policy.encode(family.records(2))
    x, sigma = torch.zeros(2, *policy.latent_shape(family.size)), torch.full((2,), 0.5)
    velocities = [policy.velocity(x, sigma, conditions, guidance_scale=scale) for scale in (1.0, 6.0)]
    assert seen == [[1000.0] * 2, [6000.0] * 2] and policy.evaluations == 4
    assert policy.rows_per_state(6.0) == 1 and not torch.equal(*velocities)


def test_the_template_is_cropped_and_the_mask_is_as_long_as_the_prompt() -> None:
    """256 tokens whatever the prompt; the released tokenizer needs 95 for the template, the tiny one three more."""
    family = subject("hunyuan_video")
    first, *_ = family.records()
    policy = family.policy(trainable="none")
    short, long = (policy.encode([replace(first, prompt=text)]).tensors for text in ("ab", "abcd" * 10))
    assert short["embeds"].shape == long["embeds"].shape == (1, 256, 16)
    for tensors, length in ((short, 3 + 2 + 1), (long, 3 + 40 + 1)):  # with <|eot_id|>
        assert tensors["mask"].tolist() == [[1] * length + [0] * (256 - length)]
    assert load_policy(family.folder, max_sequence_length=32).encode([first]).tensors["mask"].shape == (1, 32)


@pytest.mark.parametrize("values", [{"guidance_embeds": False}, {"image_condition_type": "latent_concat"}], ids=str)
def test_a_network_that_the_pipeline_would_guide_or_feed_otherwise_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    family = subject("hunyuan_video")
    shutil.copytree(family.folder, tmp_path / "pipe")
    file = tmp_path / "pipe" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(ValueError, match=next(iter(values))):
        check_image_size(str(tmp_path / "pipe"), family.size)
