"""Operators that are faster than what PyTorch puts together, each beside its plain-PyTorch reference."""
