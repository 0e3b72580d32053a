"""How the trainings of Glyphs networks show where they are."""

from collections.abc import Callable, Mapping

from tqdm import tqdm

Progress = Callable[[str, int, float], None]  # stage, steps done, loss


def progress_bars(totals: Mapping[str, int]) -> Progress:
    """A callback that shows one bar per stage; totals: its steps."""
    bars: dict[str, tqdm] = {}

    def show(stage: str, step: int, loss: float) -> None:
        if stage not in bars:
            bars[stage] = tqdm(desc=stage, total=totals[stage], initial=step - 1)
        bars[stage].update(1)
        bars[stage].set_postfix(loss=f"{loss:.4f}")

    return show
