"""What a run gave, in numbers and to look at."""
