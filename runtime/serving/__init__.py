"""Bytes on the network: the OpenAI Images API on an engine, with health, metrics, a page and administration."""
