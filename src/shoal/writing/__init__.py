"""A plan as a stock checkpoint that loads where Shoal is not installed, and the proof that it is right."""
