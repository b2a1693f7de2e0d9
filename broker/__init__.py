"""Shared core of the stream broker: what the gateway and the shards both stand on.

Imports neither `gateway` nor `shards`.
"""
