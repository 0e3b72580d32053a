"""Very small random pipelines of every model family, made in memory and offline: for tests, ours and users'. Nothing of flowalign
depends on this."""

from flowalign.testing.tiny_pipeline import tiny_names, tiny_pipeline

__all__ = ["tiny_names", "tiny_pipeline"]
