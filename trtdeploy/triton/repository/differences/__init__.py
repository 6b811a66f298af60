"""What differs between a plan, what is deployed of it, and what a server serves."""
