"""An evaluation on disk: everything as safetensors with a JSON header, its scores as a row of evaluations.jsonl."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.storage.files import append_line, reading, write_atomic

_TENSORS = ("scores", "pixels", "sources")


def save_result(path: Path, result: EvaluationResult) -> None:
    """Writes everything of `result`."""
    tensors = {
        "pixels": result.pixels.contiguous(),
        **{f"scores/{name}": scores for name, scores in result.scores.items()},
        **{f"sources/{uid}": source.contiguous() for uid, source in result.sources.items()},
    }
    plain = {field.name: vars(result)[field.name] for field in fields(result) if field.name not in _TENSORS}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(tensors, metadata={"result": json.dumps(plain)}))


def load_result(path: Path) -> EvaluationResult:
    """Reads what `save_result` wrote. Raises DamagedFile naming the file if it is damaged."""
    with reading(path), safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        plain = json.loads(file.metadata()["result"])
        scores, sources = (
            {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
            for kind in ("scores/", "sources/")
        )
        by_uid = {int(uid): source for uid, source in sources.items()}
        return EvaluationResult(scores=scores, pixels=tensors["pixels"], sources=by_uid, **plain)


def append_result(path: Path, step: int, label: str, result: EvaluationResult) -> None:
    """Appends one evaluation, every score with its prompt uid, to a JSON-lines file; null = not valid.

    The rows are those of `flowalign.storage.metrics_log` (`read_rows`; `MetricsLog(path).cut_back` when a run resumes)."""
    row = {
        "step": step,
        "label": label,
        "seed": result.seed,
        "num_inference_steps": result.num_inference_steps,
        "guidance_scale": result.guidance_scale,
        "evaluations_per_image": result.evaluations_per_image,
        "time/seconds": round(result.seconds, 3),
        "uids": result.uids,
        "scores": {name: [None if s != s else s for s in scores.tolist()] for name, scores in result.scores.items()},
    }
    append_line(path, json.dumps(row, allow_nan=False))
