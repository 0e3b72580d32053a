"""A batch in parts: what a reward says of a sample must not depend on its batch mates."""

from rewards import RewardBatch


def in_parts(batch: RewardBatch, size: int = 1) -> list[RewardBatch]:
    """Consecutive batches of at most `size` samples."""
    return [batch.select(range(start, min(start + size, len(batch)))) for start in range(0, len(batch), size)]
