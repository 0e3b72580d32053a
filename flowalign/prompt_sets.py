"""Public prompt sets by name: how the rows of their files become ours. The files themselves are the user's to get."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowalign.prompt_files import Row, parse, short


@dataclass(frozen=True)
class PromptSet:
    """origin: where to get the file. counts: numbers of prompts that its files have, () for any. prompt: the key, or column, of the
    prompt, the first that a row has. images: the key of the source images. folder: where those lie, from the file's folder.
    decoded: cells that hold JSON. nested: a key whose object becomes metadata. unique: equal rows are one prompt. lines: a .json has an
    object a line, as a .jsonl. What else a row says is metadata."""

    origin: str
    counts: tuple[int, ...] = ()
    prompt: tuple[str, ...] = ("prompt", "Prompt", "prompt_en")
    images: str | None = None
    folder: str = ""
    decoded: tuple[str, ...] = ()
    nested: str | None = None
    unique: bool = False
    lines: bool = False


PLAIN = PromptSet("")  # a file without a name
PROMPT_SETS: Mapping[str, PromptSet] = {
    # the file repeats each prompt five times
    "drawbench": PromptSet("dataset/drawbench/test.txt of github.com/NVlabs/DiffusionNFT", (200,), unique=True),
    "partiprompts": PromptSet("PartiPrompts.tsv of github.com/google-research/parti", (1632,)),
    # test_metadata.jsonl of flow_grpo and others repeats each of them four times
    "geneval": PromptSet("prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval", (553,), unique=True),
    "t2i_compbench": PromptSet("examples/dataset/*_val.txt of github.com/Karine-Huang/T2I-CompBench", (300, 700)),
    "dpg_bench": PromptSet("assets/rl_datasets/deepgen/eval/prompts_dpgbench.jsonl of github.com/deepgenteam/deepgen_rl", (1065,)),
    "unigenbench": PromptSet(
        "data/test_prompts_*.csv of github.com/CodeGoat24/UniGenBench", (600,), ("prompt", "prompt_en", "prompt_zh"),
        decoded=("sub_dims", "sub_dims_en", "sub_dims_zh"),
    ),
    "hpdv2": PromptSet("benchmark/*.json of the hub's dataset zhwang/HPDv2, a file for each style", (800,)),
    "imagereward": PromptSet("benchmark/benchmark-prompts.json of github.com/THUDM/ImageReward", (100,)),
    "pickapic": PromptSet("dataset/pickscore/*.txt of github.com/NVlabs/DiffusionNFT", (2048, 25432)),
    "vbench": PromptSet(
        "prompts/all_dimension.txt or vbench/VBench_full_info.json of github.com/Vchitect/VBench, or "
        "datasets/video_eval_prompts/vbench.csv of github.com/KwaiVGI/VideoAlign",
        (946,),
    ),
    "videogen_eval": PromptSet("datasets/video_eval_prompts/*.csv of github.com/KwaiVGI/VideoAlign, that of VideoGen-Eval", (400,)),
    "ta_hard": PromptSet("datasets/video_eval_prompts/*.csv of github.com/KwaiVGI/VideoAlign, that of TA-Hard", (72,)),
    "dancegrpo_video": PromptSet("assets/video_prompts.txt of github.com/XueZeyue/DanceGRPO", (50_000,)),
    "flow_factory_video": PromptSet("dataset/vid_prompt/*.txt of github.com/X-GenGroup/Flow-Factory"),
    "genrl_video": PromptSet("datasets/filtered_prompts/*.json of github.com/ModelTC/GenRL", lines=True),
    "flow_factory": PromptSet("dataset/*/*.jsonl of github.com/X-GenGroup/Flow-Factory, with images/ beside", folder="images"),
    "unirl_edit": PromptSet(
        "datasets/image_edit/*.jsonl of github.com/Tencent-Hunyuan/UniRL, with data/ beside", images="media", nested="metadata"
    ),
    "dancegrpo_edit": PromptSet(
        "assets/edit_data.jsonl of github.com/XueZeyue/DanceGRPO, with images/ beside", prompt=("instruction",),
        images="source_image",
    ),
    "editscore": PromptSet(
        "rl.jsonl of the hub's dataset EditScore/EditScore-RL-Data, with images/ beside", prompt=("instruction",),
        images="input_images",
    ),
    "counting_edit": PromptSet("dataset/counting_edit/*.jsonl of github.com/yifan123/flow_grpo, with its images beside"),
    # of those of the hub, whose images are bytes in a table, as rows of files: `row["input_image"].save(path)`, and the path in its place
    "gedit_bench": PromptSet(
        "the rows of the hub's dataset stepfun-ai/GEdit-Bench, of one language or both, as a .jsonl with input_image saved beside",
        (606, 1212), ("instruction",), images="input_image",
    ),
    "editscore_editreward_bench": PromptSet(
        "the rows of the hub's dataset EditScore/EditReward-Bench as a .jsonl with input_image saved beside", prompt=("instruction",),
        images="input_image",
    ),
    "tiger_editreward_bench": PromptSet(
        "the rows of the hub's dataset TIGER-Lab/EditReward-Bench as a .jsonl with source_image saved beside", (484,), ("instruction",),
        images="source_image",
    ),
}  # fmt: skip


def our_rows(chosen: PromptSet, source: str, rows: Sequence[Row]) -> list[Row]:
    """The rows with our keys: prompt, images, and metadata. ValueError for a row that is none of the set, and for another number of
    prompts than the set has."""
    found = [(place, _ours(chosen, place, dict(values))) for place, values in rows]
    if chosen.unique:
        first: dict[str, Row] = {}
        for place, values in found:
            first.setdefault(json.dumps(values, sort_keys=True), (place, values))
        found = list(first.values())
    if chosen.counts and len(found) not in chosen.counts:
        raise ValueError(
            f"got {len(found)} prompts in {source}; expected {' or '.join(map(str, chosen.counts))}: take {chosen.origin}, or leave "
            "the name out for a part of the set"
        )
    return found


def _ours(chosen: PromptSet, place: str, values: dict[str, Any]) -> dict[str, Any]:
    key = next((key for key in chosen.prompt if key in values), None)
    if key is None:
        expected = " or ".join(map(repr, chosen.prompt))
        raise ValueError(f"{place}: got {short(values)}; expected a non-empty text under {expected}")
    prompt = values.pop(key)
    for cell in chosen.decoded:
        if cell in values:
            values[cell] = parse(f"{place}, {cell}", values[cell])
    if chosen.nested in values:
        nested = values.pop(chosen.nested)
        if not isinstance(nested, dict):
            raise ValueError(f"{place}: got {chosen.nested}={short(nested)}; expected an object")
        values = {**nested, **values}
    if chosen.images in values:
        given = values.pop(chosen.images)
        values["images"] = [_path(place, each) for each in (given if isinstance(given, list) else [given])]
    return {**values, "prompt": prompt}


def _path(place: str, given: Any) -> str:
    """Of a source image, which is a path, or UniRL's {modality, role, uri}."""
    if isinstance(given, dict) and (given.get("modality"), given.get("role")) == ("image", "condition"):
        given = given.get("uri")
    if not isinstance(given, str):
        raise ValueError(
            f"{place}: got {short(given)} as a source image; expected a path, or an object with modality 'image', role "
            "'condition' and a uri"
        )
    return given
