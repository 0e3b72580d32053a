"""Rewards of images by pretrained networks, with gradients to the pixels.

A reward is its formula and what it loads; scorer: what all of them share; preprocess: from images to a network's pixels;
clip, blip, heads: the networks; checkpoints: where the weights come from.
"""

from rewards.image.aesthetic import Aesthetic
from rewards.image.clip_score import CLIPScore
from rewards.image.hps import HPSv2
from rewards.image.image_reward import ImageReward
from rewards.image.pick_score import PickScore
from rewards.image.source_similarity import SourceSimilarity

__all__ = ["Aesthetic", "CLIPScore", "PickScore", "HPSv2", "ImageReward", "SourceSimilarity"]
