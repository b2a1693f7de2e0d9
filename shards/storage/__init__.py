"""Where items live: one module per adapter behind the interface of `base`."""
