"""From a checkpoint to a model that runs, to a description, or to another format."""
