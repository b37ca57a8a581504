"""Inference replicas: an adapter or the base model answers a chat. Only `app` is cheap to import."""
