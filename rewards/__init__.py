"""Rewards: images and text in, scores out. Knows nothing of samplers or trainers.

A new reward is one new file, or a plain function named by its path; YAML names the class by import path.
"""

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput
from rewards.color import ColorAccuracy
from rewards.function import FunctionReward
from rewards.guard import score
from rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rewards.mix import Mix
from rewards.ocr import OCR, Line, RapidReader, Recognizer
from rewards.with_timeout import WithTimeout

PART_OF = "flowalign"

__all__ = [
    "Reward",
    "RewardBatch",
    "RewardOutput",
    "RewardError",
    "WithTimeout",
    "score",
    "OCR",
    "Recognizer",
    "RapidReader",
    "Line",
    "ColorAccuracy",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "Mix",
    "FunctionReward",
]
