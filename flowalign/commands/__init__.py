"""What the commands do beyond one call: how they end, where their output goes, the evaluation of models, the export of a run, the server of a reward."""
