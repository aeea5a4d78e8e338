"""The caching engine: plain torch, nothing of SGLang."""
