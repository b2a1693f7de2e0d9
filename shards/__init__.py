"""The shard process: owns a slice of the groups, their items, order, storage and triggers."""
