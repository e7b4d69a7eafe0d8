"""Public evaluation sets on real models: options by likelihood, checked answers, preferences, refusals, win rates."""
