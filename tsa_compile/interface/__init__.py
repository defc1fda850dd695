"""Attention of transformers models without a trace: by the attention implementation that its own models call."""
