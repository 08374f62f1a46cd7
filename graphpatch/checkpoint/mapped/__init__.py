"""Checkpoints of another family, by the `map` statements of the rules that turn one into the other."""
