"""From the name of a model to its files: the catalogue, the hub, and what is on this machine."""
