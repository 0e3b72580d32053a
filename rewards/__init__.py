"""Rewards: images and text in, scores out. Knows nothing of samplers or trainers.

A new reward is one new file, or a plain function named by its path; YAML names the class by import path.
"""

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, score
from rewards.colour import ColourAccuracy
from rewards.function import FunctionReward
from rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rewards.mix import Mix
from rewards.ocr import OCR
from rewards.reader import Line, RapidReader, Recogniser
from rewards.watched import Watched

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
