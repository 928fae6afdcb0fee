"""Training of the tiny checkpoints: a small world, its texts, the trainers and the scorer. Not needed at run time."""
