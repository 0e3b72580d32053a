"""Rewards: images and text in, scores out. Imports neither samplers nor trainers.

A new reward is one new file, or a plain function named by its path; YAML names the class by import path. base: the
contract; guard: `score`, through which every caller asks a reward; mix, function, with_timeout: rewards made of others;
ocr/ and workers/: reading text, and helper processes.
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
