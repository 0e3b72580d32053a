"""Rewards that are regression heads on Qwen2-VL or Qwen2.5-VL, with gradients to the pixels.

A reward is its formula, its texts and what it loads; scoring: what all of them share; regressor: the network; vision: from
images and videos to its patches; weights: the names and parts of checkpoints.
"""

from rewards.qwen.edit_reward import EditReward
from rewards.qwen.hpsv3 import HPSv3
from rewards.qwen.video_align import VideoAlign

__all__ = ["HPSv3", "VideoAlign", "EditReward"]
