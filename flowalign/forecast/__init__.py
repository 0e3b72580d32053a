"""What a run will cost, known before a model is loaded: counts, memory per phase, and hours once something was timed. Only arithmetic
and measurements on shapes; it prints and loads nothing."""
