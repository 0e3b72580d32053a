"""The OCR reward with a fake recognizer: flow_grpo's table, variants, failures, batch laws."""

import numpy as np
import pytest
import torch

from rewards import OCR, Line, RewardBatch, RewardError, score
from tests.helpers.reward_parts import in_parts


class Fake:
    """Reads what is written in the corner: image i of shade k says texts[k]. Counts the pictures it was shown."""

    def __init__(self, *texts, confidence=0.9, posterior=None):
        self.texts = texts
        self.confidence = confidence
        self.posterior = posterior
        self.shown = 0

    def read(self, images, alphabet):
        assert images.dtype == np.uint8 and images.shape[-1] == 3
        self.shown += len(images)
        posterior = None if self.posterior is None else self.posterior(alphabet)
        return [
            [Line(text, self.confidence, posterior=posterior) for text in self.texts[image[0, 0, 0]]]
            for image in images
        ]

    def load(self): ...

    def close(self): ...


def batch_for(*targets, shades=None):
    shades = list(range(len(targets))) if shades is None else shades
    images = torch.tensor(shades, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    metadata = [{} if target is None else {"target": target} for target in targets]
    return RewardBatch(prompts=["p"] * len(targets), images=images, metadata=metadata)


def only(target, lines, **options):
    return OCR(recognizer=Fake(lines), **options)(batch_for(target))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["HELLO", "world"], 1.0),
        (["HELLO W0RLD"], 0.9),
        (["xx hello world yy"], 1.0),
        ([], 0.0),
        (["z" * 100], 0.0),
        (["world", "hello"], 0.2),
    ],
)
def test_flow_grpo_table(lines, expected):
    assert only("Hello World", lines).scores.item() == pytest.approx(expected)


def test_without_the_exemption_extra_text_costs():
    output = only("Hello World", ["xx hello world yy"], substring_exempt=False)
    assert output.scores.item() == pytest.approx(0.6)
    assert output.components["edit_exempt"].item() == 1 and output.components["edit"].item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("lines", "words", "f1", "anywhere"),
    [
        (["HELLO", "world"], 1.0, 1.0, 1.0),
        (["world", "hello"], 0.0, 1.0, 5 / 10),  # each word is one substitution; of 10 letters half stand in one piece
        (["hello there world"], 0.5, 4 / 5, 7 / 10),  # "hereworld" is three edits away
        (["xx hello world yy"], 0.0, 4 / 6, 1.0),
        (["hello world world"], 0.5, 4 / 5, 1.0),
        (["helloworld"], 0.0, 0.0, 1.0),  # no space was read: two words are missing, one is other
        ([], 0.0, 0.0, 0.0),
    ],
)
def test_words_and_order(lines, words, f1, anywhere):
    output = only("Hello World", lines)
    got = [output.components[key].item() for key in ("words", "f1", "anywhere")]
    assert got == pytest.approx([words, f1, anywhere])
    for metric in ("words", "f1", "anywhere"):
        assert only("Hello World", lines, metric=metric).scores.item() == output.components[metric].item()


def test_several_targets_are_one_text_or_each_anywhere():
    swapped = only(["Open", "Closed"], ["CLOSED", "0PEN"]).components
    assert swapped["anywhere"].item() == pytest.approx((3 / 4 + 1) / 2) and swapped["f1"].item() == 0.5
    in_order = only(["Open", "Closed"], ["open", "closed"]).components
    assert all(in_order[key].item() == 1 for key in ("exact", "edit", "words", "f1", "anywhere"))
    prompt = 'a door with "Open" above "Closed" and an open "quote'
    for target, lines, edit in (("quotes", ["open"], 1.0), ("all_quotes", ["open", "closed"], 1.0)):
        batch = RewardBatch(prompts=[prompt], images=torch.zeros(1, 3, 4, 4))
        reward = OCR(target=target, recognizer=Fake(lines), substring_exempt=False)
        assert score(reward, batch).scores.item() == edit


def test_of_several_targets_each_has_to_be_a_text():
    output = score(OCR(recognizer=Fake(["A"], ["A"], ["A"])), batch_for(["A"], ["A", ""], ["A", 3]), max_fail_rate=1)
    assert output.valid[:, 0].tolist() == [True, False, False] and "is ['A', 3]; expected" in output.info[2]


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({}, 1.0),
        ({"normalize": "strict"}, 0.0),
        ({"normalize": "loose"}, 1.0),
    ],
)
def test_case_and_spaces(options, exact):
    assert only("Open Now", ["OPEN", " now"], metric="exact", **options).scores.item() == exact


def test_punctuation_counts_except_when_loose():
    assert only("Hi!", ["Hi"], metric="exact").scores.item() == 0
    assert only("Hi!", ["Hi"], metric="exact", normalize="loose").scores.item() == 1


def test_fold_forgives_listed_confusions_only():
    assert only("LOOK", ["L0OK"], metric="exact").scores.item() == 0
    assert only("LOOK", ["L0OK"], metric="exact", fold={"0": "O"}).scores.item() == 1
    assert only("LOOK", ["1OOK"], metric="exact", fold={"0": "O"}).scores.item() == 0


def test_exact_is_not_exempt():
    assert only("KITE", ["KITES"], metric="exact").scores.item() == 0


def test_min_confidence_drops_lines():
    sure = OCR(recognizer=Fake(["KITE"], confidence=0.4), min_confidence=0.5)
    assert sure(batch_for("KITE")).scores.item() == 0
    none = OCR(recognizer=Fake(["KITE"], confidence=0.0))  # flow_grpo: confidence > 0
    assert none(batch_for("KITE")).scores.item() == 0


@pytest.mark.parametrize("missing", [None, "", "   ", 7])
def test_missing_target_is_invalid_not_zero(missing):
    output = score(OCR(recognizer=Fake(["KITE"], ["KITE"])), batch_for("KITE", missing))
    assert output.valid[:, 0].tolist() == [True, False]
    assert output.scores[0] == 1 and output.scores[1].isnan()
    assert "metadata['target'] is" in output.info[1] and output.info[0] == "read 'KITE'"


def test_most_targets_missing_stops_with_the_reason():
    with pytest.raises(RewardError, match=r"reward 'ocr'.*metadata\['target'\] is None"):
        score(OCR(recognizer=Fake(["A"], ["A"], ["A"])), batch_for("A", None, None))


def test_target_from_quotes():
    prompts = ['a sign "Hello" and "World"', "no quotes", 'an open "quote', 'empty ""']
    batch = RewardBatch(prompts=prompts, images=torch.zeros(4, 3, 4, 4))
    output = score(OCR(target="quotes", recognizer=Fake(["hello"])), batch, max_fail_rate=1)
    assert output.valid[:, 0].tolist() == [True, False, False, False]
    assert output.scores[0] == 1


def test_identical_pictures_are_read_once():
    fake = Fake(["KITE"], ["KITS"])
    output = OCR(recognizer=fake)(batch_for("KITE", "KITE", "KITS", "KITS", shades=[0, 1, 0, 1]))
    assert fake.shown == 2
    assert output.components["exact"].tolist() == [1, 0, 0, 1]


def test_float_and_uint8_agree():
    levels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    shown = []

    class Spy(Fake):
        def read(self, images, alphabet):
            shown.append(images.copy())
            return [[] for _ in images]

    for images in (levels, levels.float() / 255, levels.double() / 255):
        OCR(recognizer=Spy())(RewardBatch(prompts=["a", "b"], images=images, metadata=[{"target": "A"}] * 2))
    assert np.array_equal(shown[0], shown[1]) and np.array_equal(shown[0], shown[2])
    assert np.array_equal(shown[0], levels.permute(0, 2, 3, 1).numpy())


def test_scores_follow_samples_through_permutation_and_chunks():
    texts = [["KITE"], ["KITS"], [], ["XX"], ["KI", "TE"]]
    reward = OCR(recognizer=Fake(*texts))
    batch = batch_for("KITE", "KITE", "SAIL", "XXAB", "KITE")
    whole = score(reward, batch)
    order = [3, 0, 4, 2, 1]
    assert torch.equal(score(reward, batch.select(order)).scores, whole.scores[order])
    for size in (1, 2, 3):
        chunks = [score(reward, part).scores for part in in_parts(batch, size)]
        assert torch.equal(torch.cat(chunks), whole.scores)


def test_empty_batch():
    fake = Fake()
    output = OCR(recognizer=fake)(RewardBatch(prompts=[], images=torch.zeros(0, 3, 4, 4)))
    assert output.scores.shape == (0,) and output.valid.shape == (0,) and fake.shown == 0


def peaks(text, sure):
    """A CTC posterior over an alphabet: each letter with probability `sure` (rest: blank), blanks between."""

    def posterior(alphabet):
        rows = np.zeros((2 * len(text), 1 + len(alphabet)), dtype=np.float32)
        rows[1::2, 0] = 1
        for i, char in enumerate(text):
            rows[2 * i, 1 + alphabet.index(char)] = sure
            rows[2 * i, 0] = 1 - sure
        return rows

    return posterior


def test_soft_is_the_geometric_mean_probability_of_a_letter():
    for sure in (1.0, 0.5, 0.2):
        fake = Fake(["KITE"], posterior=peaks("KiTe", sure))  # upper and lower case both count
        output = OCR(metric="soft", recognizer=fake)(batch_for("kite"))
        assert output.scores.item() == pytest.approx(sure, rel=1e-6)


def test_soft_separates_what_reads_alike():
    scores = [
        OCR(metric="soft", recognizer=Fake(["KITE"], posterior=peaks("KITE", p)))(batch_for("KITE")) for p in (0.6, 0.9)
    ]
    assert scores[0].components["exact"] == scores[1].components["exact"] == 1
    assert scores[0].scores < scores[1].scores


@pytest.mark.parametrize("min_confidence", [0.0, 0.5])
def test_soft_does_not_drop_to_zero_where_no_letter_wins(min_confidence):
    """Below one half the blank wins everywhere: the greedy text is empty, its confidence 0, the likelihood is not."""
    fake = Fake([""], confidence=0.0, posterior=peaks("KITE", 0.4))
    output = OCR(metric="soft", recognizer=fake, min_confidence=min_confidence)(batch_for("KITE"))
    assert output.scores.item() == pytest.approx(0.4, rel=1e-6)
    assert output.components["edit"].item() == 0


def test_soft_of_two_lines_keeps_double_letters_apart():
    fake = Fake(["A", "A"], posterior=lambda alphabet: np.eye(1, 1 + len(alphabet), 1 + alphabet.index("A")))
    assert OCR(metric="soft", recognizer=fake)(batch_for("AA")).scores.item() == pytest.approx(1)


def test_soft_of_nothing_read_is_zero_and_a_reader_without_posterior_is_refused():
    assert OCR(metric="soft", recognizer=Fake([]))(batch_for("KITE")).scores.item() == 0
    with pytest.raises(RewardError, match="needs a recognizer with posteriors"):
        score(OCR(metric="soft", recognizer=Fake(["KITE"])), batch_for("KITE"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "edt"}, "got metric='edt'"),
        ({"target": "prompt"}, "got target='prompt'"),
        ({"normalize": "lose"}, "got normalize='lose'"),
        ({"fold": {"0": "OO"}}, "expected one character for one"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        OCR(**options)
