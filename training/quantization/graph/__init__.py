"""A network as torch.fx traces it: what runs in it, and what is one and the same there."""
