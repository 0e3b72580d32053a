"""One file per model family: how its pipeline encodes, predicts and decodes, and which solver it samples with."""
