"""Rewards: images, videos or latents with text in, scores out. Imports neither samplers nor trainers.

A new reward is one new file, or a plain function named by its path; YAML names the class by import path.

base: the contract. guard: `score`, through which every caller asks a reward (isolation: what it may change; duplicates: equal
samples are asked once; answers: parts of an answer). scoring: many batches, in a thread if the reward is elsewhere. listing: what
rewards there are.
mix, channels, routed, ensembles, shaping, augmented, frames, completion, with_timeout, offloaded: rewards made of others (parts: what
they share). function: a plain function. color, jpeg, monitors, motion, diversity: without a model (features: how alike two
pictures are; source_consistency: what an edit kept). inverse_dynamics: whether a video shows its actions. ctrl_u: losses weighted by certainty.
image/: pretrained networks. qwen/: Qwen-VL with a regression head. judges/: vision-language models that are asked through a chat
endpoint. ocr/, geneval/: reading text, checking objects. remote/: rewards in another process (workers/), or behind HTTP.
"""

from rewards.augmented import Augmented
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
from rewards.color import ColorAccuracy, ColorCloseness
from rewards.completion import OnCompletion
from rewards.diversity import GroupDiversity
from rewards.ensembles import Ensemble
from rewards.features import Features, Thumbnail
from rewards.frames import OnFrames
from rewards.function import FunctionReward
from rewards.geneval import CLIPColors, ColorClassifier, Detections, Detector, GenEval, Mask2Former
from rewards.guard import close, score
from rewards.image import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore, SourceSimilarity
from rewards.inverse_dynamics import InverseDynamics, InverseDynamicsModel
from rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rewards.judges import (
    PARM,
    WISE,
    ChatEndpoint,
    DeQA,
    EditScore,
    Questions,
    QwenVL,
    Sampling,
    UnifiedReward,
    UnifiedWinRate,
)
from rewards.mix import Mix
from rewards.monitors import ImageStatistics
from rewards.motion import MotionBand, VideoStatistics
from rewards.ocr import OCR, Line, RapidReader, Recognizer
from rewards.offloaded import Offloaded
from rewards.qwen import EditReward, HPSv3, VideoAlign
from rewards.remote import Http, InWorker
from rewards.routed import Routed
from rewards.scoring import Scoring
from rewards.shaping import Capped, Gated, Standardized
from rewards.source_consistency import SourceConsistency
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
    "Scoring",
    "close",
    "OCR",
    "Recognizer",
    "RapidReader",
    "Line",
    "ColorAccuracy",
    "ColorCloseness",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "Aesthetic",
    "CLIPScore",
    "PickScore",
    "HPSv2",
    "ImageReward",
    "SourceSimilarity",
    "GenEval",
    "Detector",
    "ColorClassifier",
    "Detections",
    "Mask2Former",
    "CLIPColors",
    "ImageStatistics",
    "VideoStatistics",
    "MotionBand",
    "InverseDynamics",
    "InverseDynamicsModel",
    "GroupDiversity",
    "Features",
    "Thumbnail",
    "SourceConsistency",
    "HPSv3",
    "VideoAlign",
    "EditReward",
    "Mix",
    "Channels",
    "Routed",
    "Ensemble",
    "Standardized",
    "Capped",
    "Gated",
    "Augmented",
    "OnFrames",
    "OnCompletion",
    "FunctionReward",
    "ChatEndpoint",
    "Sampling",
    "EditScore",
    "UnifiedReward",
    "UnifiedWinRate",
    "QwenVL",
    "DeQA",
    "WISE",
    "Questions",
    "PARM",
    "Offloaded",
    "InWorker",
    "Http",
]
