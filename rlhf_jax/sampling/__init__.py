"""Completions drawn from a model: the distribution sampled from, the decode loop, prompts and text."""
