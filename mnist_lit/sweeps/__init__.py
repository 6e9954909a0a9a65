"""Many runs: grids and searches, their tables and pictures."""
