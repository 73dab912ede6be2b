"""Smaller models by other means than number formats, and what helps narrow ones to learn."""
