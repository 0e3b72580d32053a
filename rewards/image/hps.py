"""HPSv2.0 and v2.1 (2306.09341): CLIP trained on human preferences of the Human Preference Dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewards.base import RewardSpec
from rewards.image.checkpoints import check_place, find_file, load_strictly, read_state
from rewards.image.clip import clip_of
from rewards.image.preprocess import Mode, Preprocess
from rewards.image.scorer import (
    DTYPES,
    Dtype,
    Scorer,
    call_scorer,
    check_choice,
    check_settings,
    close_scorer,
    load_scorer,
    offload_scorer,
)

Version = Literal["v2.0", "v2.1"]
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@dataclass(eq=False)
class HPSv2:
    """Which image would people prefer for this prompt? The cosine of image and prompt, without CLIP's logit scale.

    Typically 0.24 to 0.29 (v2.0) and 0.15 to 0.34 (v2.1): in a sum with other rewards it vanishes unless it is standardized.
    Compare only within one prompt. The public table shows 100 times the cosine. Code: tgxs002/HPSv2.

    The whole image is seen: the long side becomes 224, the rest is black. Others crop (ExplainableML/ReNO) and get other
    numbers. version: of the file. model: hub id, folder, or file {"state_dict": …}. architecture: a name of open_clip's, or
    a .json file with embed_dim, vision_cfg and text_cfg. preprocess to batch_size: see rewards.image.scorer.Settings.
    FileNotFoundError and ValueError, when it is loaded, say what to get.
    """

    version: Version = "v2.1"
    model: str = "xswu/HPSv2"
    architecture: str = "ViT-H-14"
    preprocess: Mode = "tensor"
    quantize: bool = False
    dtype: Dtype = "fp32"
    device: str | None = None
    batch_size: int = 32
    name: str = "hps"
    scorer: Scorer | None = field(default=None, init=False, repr=False)

    __call__, load, close, offload = call_scorer, load_scorer, close_scorer, offload_scorer

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("version", self.version, Version)
        check_place("model", self.model)
        check_place("architecture", self.architecture)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            differentiable=self.preprocess == "tensor",
            range=(-1, 1),
            licence="code Apache-2.0; weights: see the card of the checkpoint",
            checkpoint=f"{self.model}, {FILES[self.version]}",
            memory="M",
        )

    def build(self) -> Scorer:
        import open_clip

        path = find_file("model", self.model, FILES[self.version])
        config = self._config()
        network = open_clip.CLIP(**config)
        state = read_state(path)
        load_strictly(network, state.get("state_dict", state), path)
        preprocess = Preprocess(config["vision_cfg"]["image_size"], fit="pad")
        clip = clip_of(network, open_clip.tokenize, preprocess, DTYPES[self.dtype])
        return Scorer(clip.network, preprocess, clip.cosine)

    def _config(self) -> dict[str, Any]:
        """The arguments of open_clip.CLIP."""
        import open_clip

        if self.architecture.endswith(".json"):
            config = json.loads(Path(self.architecture).expanduser().read_text(encoding="utf-8"))
        else:
            config = open_clip.get_model_config(self.architecture)
        if config is None:
            raise ValueError(
                f"got architecture={self.architecture!r}; expected a model of open_clip, such as 'ViT-H-14', or a .json file"
            )
        return dict(config)
