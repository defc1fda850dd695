"""Training on sparse rollouts: corrections, a gate, a hook for TRL, an adapter."""
