"""From data to weights: the default model's recipe."""
