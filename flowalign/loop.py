"""The main loop. Nothing of a method is in it."""

from __future__ import annotations

from typing import Any

from flowalign.config import TrainConfig
from flowalign.run.run import open_run


def train(config: TrainConfig, plain: dict[str, Any]) -> dict[str, Any]:
    """Trains and returns the summary (also in the run folder). `plain` is the configuration as data."""
    trainer = config.trainer
    with open_run(config, plain) as run:
        trainer.prepare(run.task, run.checkpoints.trainer_state)
        run.resume()
        run.evaluate_base()
        for iteration in run.iterations():
            batch = trainer.collect(run.prompts(iteration), iteration)
            for update in trainer.updates(batch):
                for micro_batch in update.micro_batches:
                    run.backward(micro_batch(), update)
                run.step(update)
            run.end(iteration, batch)
        return run.finish()
