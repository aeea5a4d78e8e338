"""`sglang-cachedit tune`: schedules fitted to the deployer's own model."""
