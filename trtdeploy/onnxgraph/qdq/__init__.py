"""Q/DQ pairs: where they are wanted, and putting them in and taking them out."""
