"""The routed model: one forward pass in which a policy chooses the blocks. Knows no policy by name."""
