"""One model served in many ways, each measured on a server of its own."""
