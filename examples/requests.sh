#!/bin/sh
# Requests with curl; the server's address is the first argument.
set -eu
URL=${1:-http://127.0.0.1:30000}

# One picture with the server's own settings; the report without the picture.
curl -sf "$URL/v1/images/generations" -H 'Content-Type: application/json' \
  -d '{"prompt": "a red apple", "size": "1024x1024", "response_format": "b64_json"}' |
  python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["cache_dit"], indent=1))'

# The same with another quality.
curl -sf "$URL/v1/images/generations" -H 'Content-Type: application/json' \
  -d '{"prompt": "a red apple", "size": "1024x1024", "response_format": "b64_json",
       "enable_cache_dit": true, "cache_dit_params": {"error_tolerance": 0.005}}' >/dev/null

# What holds now. Changing it needs the key of SGLANG_CACHE_DIT_CONTROL_KEY from other machines.
curl -sf "$URL/v1/cache_dit"
