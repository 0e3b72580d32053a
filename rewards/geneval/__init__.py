"""GenEval: clauses and rules of the benchmark, and what detects objects and colors for it."""

from rewards.geneval.clip_colors import CLIPColors
from rewards.geneval.detections import ColorClassifier, Detections, Detector
from rewards.geneval.geneval import GenEval, overall
from rewards.geneval.mask2former import Mask2Former

__all__ = ["GenEval", "Detector", "ColorClassifier", "Detections", "Mask2Former", "CLIPColors", "overall"]
