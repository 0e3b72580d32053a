"""Reading text in pictures: the OCR reward, the recognizer that it asks, and what compares texts."""

from rewards.ocr.ocr import OCR
from rewards.ocr.reader import Line, RapidReader, Recognizer

__all__ = ["OCR", "Line", "RapidReader", "Recognizer"]
