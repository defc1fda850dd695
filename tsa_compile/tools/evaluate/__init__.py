"""`tsa-compile eval`: what sparsity costs real models, in retrieval, perplexity and divergence from dense."""
