"""Plug-in for vLLM: the plan's prefill policies over its paged cache. docs/serving.md says how it is used."""
