"""Building a plan: optimized in several ways, measured, the fastest right one kept."""
