"""What a model is worth: its answers to held-out prompts, their scores, and intervals that pair the prompts."""
