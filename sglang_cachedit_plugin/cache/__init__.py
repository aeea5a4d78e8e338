"""The caching engine: torch, without SGLang."""
