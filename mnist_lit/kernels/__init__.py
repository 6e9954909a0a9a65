"""Operators faster than PyTorch's own, each with a plain-PyTorch reference."""
