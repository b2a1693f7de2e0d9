"""What tests that go through the front door share: processes, raw connections, comparison."""
