"""From token shards to checkpoints."""
