#!/usr/bin/env bash
# A server whose prefill is block-sparse: examples/serve/serve.sh MODEL [more options of vllm serve]
# pip install "tsa-compile[vllm]" first. Decode, sampling, cache and scheduling stay vLLM's own.
set -euo pipefail
model=${1:?a Hugging Face folder or id}; shift
options=${TSA:-'{"tsa": {"policy": "BlockSparse", "alpha": 0.05}}'}
exec python -m vllm.entrypoints.openai.api_server --model "$model" --attention-backend CUSTOM --additional-config "$options" "$@"
