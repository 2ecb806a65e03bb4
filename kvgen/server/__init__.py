"""An HTTP server for OpenAI's API: a model that stays in memory, and caches that later requests continue from."""
