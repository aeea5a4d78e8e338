"""`sglang-cachedit bench`: uncached, the stock integration and the plugin side by side."""
