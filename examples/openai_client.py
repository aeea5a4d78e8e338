"""Draw one picture with caching through the OpenAI client: ``python examples/openai_client.py "a red apple"``.

Needs a server: ``SGLANG_CACHE_DIT_PROFILE=balanced sglang serve --model-path MODEL --port 30000``.
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("prompt")
parser.add_argument("--url", default="http://127.0.0.1:30000/v1")
parser.add_argument("--profile", default="balanced", help="quality, balanced, fast, or one of the server's own")
parser.add_argument("--size", default="1024x1024")
parser.add_argument("--out", type=Path, default=Path("picture.png"))
args = parser.parse_args()

answer = OpenAI(base_url=args.url, api_key="none").images.generate(
    prompt=args.prompt, size=args.size, response_format="b64_json",
    extra_body={"enable_cache_dit": True, "cache_dit_params": {"profile": args.profile}},
)
args.out.write_bytes(base64.b64decode(answer.data[0].b64_json))
report = answer.model_extra["cache_dit"]
print(f"{args.out}: {report['computed_steps']} steps computed, {report['cached_steps']} cached")
if report["reason"]:
    print(report["reason"])
