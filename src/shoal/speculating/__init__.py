"""Lossless self-speculation: few layers draft, all of them verify, over one KV cache."""
