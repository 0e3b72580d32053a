"""Glyphs-Edit: its edits, what is to be kept, what pre-training draws, and what the shipped folder can do."""

import pytest
import torch
from diffusers import FluxKontextPipeline
from torchvision.transforms.functional import to_tensor

from flowalign.glyphs.edit import CALL_ARGS, PIPELINE, held_out_prompts, train_prompts
from flowalign.glyphs.edit.figures import judge, sample_edits
from flowalign.glyphs.edit.parts import TOKENS, build_pipeline
from flowalign.glyphs.edit.pretrain import encode_pictures, encode_text, sample_batch
from flowalign.glyphs.edit.prompts import AXES, Edit, draw_edits
from flowalign.glyphs.prompts import Scene
from flowalign.glyphs.prompts import held_out_prompts as held_out_scenes

SOURCE = Scene("KITE", "red", "white")
EDITS = [Edit(SOURCE, "ink", "blue"), Edit(SOURCE, "paper", "pink"), Edit(SOURCE, "word", "LAMP")]


def test_instructions_and_results() -> None:
    assert [edit.instruction for edit in EDITS] == [
        "write it in blue", "put it on a pink background", 'change the word to "LAMP"',
    ]  # fmt: skip
    assert [edit.result for edit in EDITS] == [
        Scene("KITE", "blue", "white"), Scene("KITE", "red", "pink"), Scene("LAMP", "red", "white"),
    ]  # fmt: skip


def test_sets_are_even_and_change_something() -> None:
    train, held_out = train_prompts(), held_out_prompts()
    assert (len(train), len(held_out)) == (1024, 512)
    assert {round(3 * sum(record["axis"] == axis for record in train) / len(train), 1) for axis in AXES} == {1.0}
    unseen = {record["target"] for record in held_out_scenes()}
    assert {record["target"] for record in held_out} <= unseen
    assert not {record["target"] for record in train} & unseen
    assert len({(record["prompt"], record["image"].tobytes()) for record in train}) == len(train)


def test_what_is_to_be_kept_is_where_the_right_result_equals_the_source() -> None:
    sources, results = draw_edits(EDITS, torch.zeros(3, 2, dtype=torch.long))
    letters = sources[0, 1] < 0.5  # red on white
    same = (sources == results).all(1)
    assert torch.equal(same[0] & (sources[0, 1] == 1), sources[0, 1] == 1)  # of ink edits the paper
    assert not (same[0] & letters).any()
    assert torch.equal(same[1], sources[1, 1] == 0)  # of paper edits what is ink alone
    assert same[2].any() and (same[2] & letters).any()  # of word edits both
    record = held_out_prompts()[0]
    assert [len(row) for row in record["keep"]] == [48] * 24


def test_pretraining_draws_no_held_out_word() -> None:
    unseen = {record["target"] for record in held_out_scenes()}
    edits = sample_batch(2048, torch.Generator().manual_seed(0)).edits
    assert not {word for edit in edits for word in (edit.source.word, edit.result.word)} & unseen
    assert all(edit.result != edit.source for edit in edits)


def test_text_features_are_those_of_the_pipeline() -> None:
    pipeline, prompts = build_pipeline(), [EDITS[0].instruction, EDITS[2].instruction, ""]
    with torch.no_grad():
        tokens, pooled = encode_text(pipeline, prompts)
        expected, expected_pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=TOKENS)
    assert torch.equal(tokens, expected)
    assert torch.equal(pooled, expected_pooled)
    assert pipeline.tokenizer_2.tokenize('"LAMP"') == ['▁"L', "A", "M", 'P"']


@pytest.fixture(scope="module")
def pipeline() -> FluxKontextPipeline:
    loaded = FluxKontextPipeline.from_pretrained(PIPELINE)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_vae_is_near_lossless(pipeline: FluxKontextPipeline) -> None:
    pictures = torch.stack([to_tensor(record["image"]) for record in held_out_prompts()[:32]])
    with torch.no_grad():
        decoded = pipeline.vae.decode(encode_pictures(pipeline.vae, pictures)).sample / 2 + 0.5
    assert (decoded - pictures).abs().mean() <= 0.02


def test_the_base_changes_colors_and_some_words(pipeline: FluxKontextPipeline) -> None:
    records = held_out_prompts()[:48]
    figures = judge(sample_edits(pipeline, records, 8, 1.0), records)
    assert figures["ink"].exact >= 0.8
    assert figures["paper"].colors >= 0.9
    assert 0.1 <= figures["word"].exact <= 0.8
    assert all(row.kept >= 0.93 for row in figures.values())


def test_the_guidance_scale_means_little(pipeline: FluxKontextPipeline) -> None:
    record = held_out_prompts()[0]
    images = [
        pipeline(
            prompt=record["prompt"], image=record["image"], num_inference_steps=4, guidance_scale=scale, output_type="pt",
            generator=torch.Generator().manual_seed(0), **CALL_ARGS,
        ).images
        for scale in (1.0, 3.5)
    ]  # fmt: skip
    assert (images[0] - images[1]).abs().mean() < 0.02
