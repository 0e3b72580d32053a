"""Judges: vision-language models that are asked about images through a chat endpoint, which the user serves.

client: the endpoint; template: the wording of questions, ours or the canonical one; parse: what an answer says, or that it
says nothing; asking: what judges share. A judge is one file, and never makes up a score."""

from rewards.judges.client import ChatEndpoint, Sampling
from rewards.judges.deqa import DeQA
from rewards.judges.edit_score import EditScore
from rewards.judges.parm import PARM, best_of
from rewards.judges.questions import Questions
from rewards.judges.qwen_vl import QwenVL
from rewards.judges.unified import UnifiedReward, UnifiedWinRate
from rewards.judges.wise import WISE

__all__ = [
    "PARM",
    "WISE",
    "ChatEndpoint",
    "DeQA",
    "EditScore",
    "Questions",
    "QwenVL",
    "Sampling",
    "UnifiedReward",
    "UnifiedWinRate",
    "best_of",
]
