"""Operators faster than PyTorch's own, and memory that is kept for the next step."""
