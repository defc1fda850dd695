"""FX passes: find attention in a traced graph, decide, rewrite, verify. `pipeline.py` reads as the story."""
