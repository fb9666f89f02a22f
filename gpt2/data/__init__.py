"""Text -> documents -> token shards -> the batch at step s."""
