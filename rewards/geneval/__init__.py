"""GenEval: clauses and rules of the benchmark, and what detects objects and colors for it."""

from rewards.geneval.detections import ColorClassifier, Detections, Detector
from rewards.geneval.geneval import GenEval, overall

__all__ = ["GenEval", "Detector", "ColorClassifier", "Detections", "overall"]
