"""Energy of a model's work: codecarbon's measurement around it, and the CSV log."""
