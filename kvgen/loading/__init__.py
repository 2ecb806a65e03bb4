"""Load a checkpoint, describe it, or convert it to another format."""
