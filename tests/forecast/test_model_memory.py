"""Every model of configs/models on every card of configs/hardware: what the forecast says, from footprints that were measured once."""

import json
import re
import runpy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.errors import ConfigError
from flowalign.forecast.memory import Memory, check, device_memory
from flowalign.forecast.recorded import RecordedFootprint
from flowalign.testing.shapes import SHAPES

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "model_memory.py"))
TABLE = json.loads((ROOT / "docs" / "results" / "model_memory.json").read_text())["models"]
PAGE = (
    (ROOT / "docs" / "models.md")
    .read_text()
    .partition("### From a model and a card to a command")[2]
    .partition("\n## ")[0]
)
RECIPES = ("sd35_medium", "flux1_dev", "flux2_klein", "qwen_image", "z_image", "wan21_1_3b")
# billions of numbers as their authors publish them: all trained networks, all text and image encoders
PUBLISHED = {
    "flux1_dev": (11.9, 4.89), "flux1_kontext": (11.9, 4.89), "flux1_schnell": (11.9, 4.89), "flux2_klein": (3.88, 4.02),
    "hunyuan_video": (12.8, 7.63), "ltx_video": (1.92, 4.76), "qwen_image": (20.4, 8.29), "qwen_image_edit": (20.4, 8.29), "qwen_image_edit_plus": (20.4, 8.29),
    "sana_1600m": (1.60, 2.61), "sd15": (0.86, 0.123), "sd21": (0.866, 0.340), "sd35_medium": (2.47, 5.58), "sdxl": (2.57, 0.82),
    "sdxl_turbo": (2.57, 0.82), "wan21_1_3b": (1.42, 5.68), "wan21_14b": (14.3, 5.68), "wan21_i2v": (16.4, 6.31), "wan22": (28.6, 5.68), "wan22_5b": (5.0, 5.68), "wan22_i2v": (28.6, 5.68), "z_image": (6.15, 4.02),
}  # fmt: skip


def footprint(model: str) -> RecordedFootprint:
    return RecordedFootprint(**TABLE[model]["footprint"])


def test_every_model_has_a_shape_and_every_layer_of_hardware_is_a_card() -> None:
    folders = {
        kind: {path.stem for path in (ROOT / "configs" / kind).glob("*.yaml")} for kind in ("models", "hardware")
    }
    assert set(SHAPES) == set(TABLE) == folders["models"] - {"glyphs", "glyphs_edit", "glyphs_video"}
    assert set(SCRIPT["CARDS"]) == folders["hardware"]


@pytest.mark.parametrize("model", SHAPES)
def test_the_shapes_have_as_many_numbers_as_the_published_model(model: str) -> None:
    """Two bytes each; buffers beside them, of SD3 a table of 0.2 billion positions."""
    network, encoders = PUBLISHED[model]
    own = footprint(model)
    assert own.networks["none"] / 2e9 == pytest.approx(network, rel=0.01)
    assert own.encoders / 2e9 == pytest.approx(encoders, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("model", SHAPES)
def test_the_recorded_footprint_is_the_measured_one(model: str, large_machine: None) -> None:
    """To a hundredth: a view more or less moves a peak by kilobytes."""
    found, recorded = asdict(SCRIPT["measured"](model)), TABLE[model]["footprint"]
    assert found.keys() == recorded.keys() and found["states"].keys() == recorded["states"].keys()
    for name, value in found.items():
        for scale, each in value.items() if name == "states" else [("", value)]:
            assert each == pytest.approx(recorded[name][scale] if scale else recorded[name], rel=0.01), name


@pytest.mark.parametrize(
    ("model", "card"),
    [
        pytest.param(model, card, marks=[] if card == "24gb" else [pytest.mark.slow])
        for model in SHAPES
        for card in SCRIPT["CARDS"]
    ],
)
def test_a_layer_on_a_card_is_accepted_or_refused_with_the_switches(
    model: str, card: str, tmp_path: Path, large_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded and checked as by `flowalign forecast`; what the refusal proposes is accepted, as configuration and as forecast."""
    monkeypatch.setattr("flowalign.models.quantization.find_spec", lambda name: name)  # bitsandbytes is an extra
    place, own, row = SCRIPT["stand_in"](model, tmp_path, depth=2), footprint(model), TABLE[model]["cards"][card]
    config = SCRIPT["load"](model, card, place)
    assert SCRIPT["on_card"](config, own) == row
    room = device_memory(config, torch.device("cpu"))
    assert room is not None
    devices = config.run.device_count or 1
    if not row["fits"]:
        assert row["switches"] == []
        with pytest.raises(ConfigError, match=r"none of decode_batch.* is enough: take a larger device"):
            check(Memory(config, own, devices), room)
    elif row["switches"]:
        with pytest.raises(ConfigError, match=re.escape(f": set {' '.join(row['switches'])}") + "$"):
            check(Memory(config, own, devices), room)
        config = SCRIPT["load"](model, card, [*place, *" ".join(row["switches"]).split()])
    if row["fits"]:
        check(Memory(config, own, devices), room)


def test_the_written_table_is_that_of_the_figures() -> None:
    assert (ROOT / "docs" / "results" / "model_memory.md").read_text() == SCRIPT["table"](TABLE)


@pytest.mark.parametrize("model", RECIPES)
def test_the_commands_of_the_page_are_those_of_the_forecast(model: str) -> None:
    """Its layers and, by card, what follows them; a card that cannot hold the model is said."""
    (line,) = re.findall(rf"\| `models/{model}.yaml` \| (.*) \|", PAGE)
    cells = [cell.strip() for cell in line.split(" | ")]
    expected: list[Any] = []
    for card in SCRIPT["CARDS"]:
        row = TABLE[model]["cards"][card]
        expected.append(f"`{' '.join(row['switches'])}`" if row["switches"] else "–" if row["fits"] else "does not fit")
    assert cells == expected
