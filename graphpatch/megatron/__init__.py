"""megatron-core: the same rules on models whose layers are sharded over ranks."""
