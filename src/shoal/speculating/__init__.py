"""Lossless self-speculation: few layers draft, all of them judge, over one KV cache."""
