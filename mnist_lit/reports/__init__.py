"""The results of a run as scores, figures and an HTML page."""
