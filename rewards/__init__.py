"""Rewards: images, videos or latents with text in, scores out. Imports neither samplers nor trainers.

A new reward is one new file, or a plain function named by its path; YAML names the class by import path. base: the
contract; guard: `score`, through which every caller asks a reward (isolation: what it may change); mix, channels, with_timeout: rewards made of others
(parts: what they share); function: a plain function; ocr/ and workers/: reading text, and helper processes; remote/: rewards
in another process, or behind HTTP.
"""

from rewards.base import (
    Reward,
    RewardBatch,
    RewardError,
    RewardOutput,
    RewardSpec,
    channels_of,
    labels_of,
    pictures,
    spec_of,
)
from rewards.channels import Channels
from rewards.color import ColorAccuracy
from rewards.function import FunctionReward
from rewards.guard import close, score, score_chunks
from rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rewards.mix import Mix
from rewards.ocr import OCR, Line, RapidReader, Recognizer
from rewards.remote import Http, InWorker
from rewards.with_timeout import WithTimeout

PART_OF = "flowalign"

__all__ = [
    "Reward",
    "RewardBatch",
    "RewardOutput",
    "RewardError",
    "RewardSpec",
    "channels_of",
    "labels_of",
    "pictures",
    "spec_of",
    "WithTimeout",
    "score",
    "score_chunks",
    "close",
    "OCR",
    "Recognizer",
    "RapidReader",
    "Line",
    "ColorAccuracy",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "Mix",
    "Channels",
    "FunctionReward",
    "InWorker",
    "Http",
]
