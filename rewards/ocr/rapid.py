"""RapidOCR as an engine: a detector (for pictures), a line recognizer with its CTC posterior, both on one thread.

Runs in a worker process (see `rewards.workers.worker`), so it imports nothing of this package, and nothing heavy before
`Engine()`.
"""

from typing import Any

import numpy as np

LINE_HEIGHT = 48  # rows the recognizer was trained on


class Engine:
    """(header, uint8 RGB [N, H, W, 3]) -> (lines, posteriors).

    header: {"detect": bool, "alphabet": str}. Answer: {"lines": for each picture a list of {"text",
    "confidence", "box", "frames"}} and the posteriors of all lines, float32 [sum of frames, 1 + len(alphabet)]: blank
    first, then the characters of the alphabet (0 for one the model does not know).
    """

    def __init__(self) -> None:
        import cv2
        from rapidocr import RapidOCR

        cv2.setNumThreads(1)
        self.engine: Any = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,
                "Global.use_rec": False,  # its call detects; lines are read below, which keeps the CTC posterior
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Det.limit_type": "max",  # with "min", the default, every picture is first enlarged to 736
                "Det.limit_side_len": 1024,
            }
        )
        self.engine.recognize_txt([np.zeros((LINE_HEIGHT, LINE_HEIGHT, 3), dtype=np.uint8)])  # loads the recognizer
        recognizer: Any = self.engine.text_rec
        self.session = recognizer.session
        self.characters: list[str] = recognizer.postprocess_op.character  # the blank is number 0
        self.number = {char: i for i, char in enumerate(self.characters)}

    def __call__(self, header: dict[str, Any], images: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise TypeError(f"got images {images.dtype} {images.shape}; expected uint8 RGB [N, H, W, 3]")
        alphabet: str = header["alphabet"]
        columns = [0] + [self.number.get(char, -1) for char in alphabet]
        known = np.array(columns) >= 0
        pages = np.ascontiguousarray(images[..., ::-1])  # RapidOCR takes arrays as BGR
        found = self._detect(pages) if header["detect"] else self._as_lines(pages)
        lines: list[list[dict[str, Any]]] = []
        kept: list[np.ndarray] = []
        for page in found:
            lines.append([])
            for box, posterior in page:
                text, confidence = self._decode(posterior)
                lines[-1].append({"text": text, "confidence": confidence, "box": box, "frames": len(posterior)})
                kept.append(posterior[:, columns] * known)
        empty = np.zeros((0, len(columns)), dtype=np.float32)
        return {"lines": lines}, np.concatenate([empty, *kept]).astype(np.float32)

    def _as_lines(self, pages: np.ndarray) -> list[list[tuple[None, np.ndarray]]]:
        """Every picture is one line of text; all are read in one call, since they have one size."""
        if not len(pages):
            return []
        return [[(None, posterior)] for posterior in self.session(np.stack([strip(page, 0) for page in pages]))]

    def _detect(self, pages: np.ndarray) -> list[list[tuple[list[list[float]], np.ndarray]]]:
        """The lines that the detector finds, top to bottom, then left to right; each read alone, so that no line's
        padding depends on another."""
        from rapidocr.utils.process_img import get_rotate_crop_image

        found = []
        for page in pages:
            boxes = self.engine(page).boxes
            corners = [] if boxes is None else [np.asarray(box, dtype=np.float32) for box in boxes]
            crops = [get_rotate_crop_image(page, box.copy()) for box in corners]
            # 320 columns at least: RapidOCR's own padding, which its model expects of short lines
            reads = [self.session(strip(crop, 320)[None])[0] for crop in crops]
            found.append([(box.tolist(), read) for box, read in zip(corners, reads, strict=True)])
        return found

    def _decode(self, posterior: np.ndarray) -> tuple[str, float]:
        """Greedy CTC: the best class of each frame, repeats merged, blanks dropped; and its mean probability."""
        best = posterior.argmax(axis=1)
        keep = (best != 0) & (best != np.concatenate([[-1], best[:-1]]))
        confidence = float(posterior.max(axis=1)[keep].mean()) if keep.any() else 0.0
        return "".join(self.characters[i] for i in best[keep]), confidence


def strip(image: np.ndarray, min_width: int) -> np.ndarray:
    """A uint8 BGR picture [h, w, 3] as the recognizer wants it: float32 [3, 48, W] in [-1, 1], padded with zeros.

    Whole multiples are enlarged by repeating pixels: Glyphs then read better than interpolated (99.4 % against 98.6 %).
    """
    import cv2

    height, width = image.shape[:2]
    if LINE_HEIGHT % height == 0:
        image = image.repeat(LINE_HEIGHT // height, 0).repeat(LINE_HEIGHT // height, 1)
    else:
        image = cv2.resize(image, (-(-LINE_HEIGHT * width // height), LINE_HEIGHT))
    page = np.zeros((3, LINE_HEIGHT, max(image.shape[1], min_width)), dtype=np.float32)
    page[:, :, : image.shape[1]] = image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    return page
