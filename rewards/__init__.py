"""Rewards: images and text in, scores out. Knows nothing of samplers or trainers.

A new reward is one new file, or a plain function named by its path; YAML names the class by import path.
"""

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, score
from rewards.color import ColourAccuracy
from rewards.function import FunctionReward
from rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rewards.mix import Mix
from rewards.ocr.ocr import OCR
from rewards.ocr.reader import Line, RapidReader, Recogniser
from rewards.with_timeout import Watched

PART_OF = "flowalign"

__all__ = [
    "Reward",
    "RewardBatch",
    "RewardOutput",
    "RewardError",
    "Watched",
    "score",
    "OCR",
    "Recogniser",
    "RapidReader",
    "Line",
    "ColourAccuracy",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "Mix",
    "FunctionReward",
]
