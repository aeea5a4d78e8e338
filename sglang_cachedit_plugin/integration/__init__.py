"""All that knows SGLang: hooks, stages, ranks, requests."""
