"""Measurements behind decisions that the documentation explains; run by hand."""
