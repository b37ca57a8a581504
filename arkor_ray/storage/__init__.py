"""Objects: one interface, two backends (a local directory and S3), and the one place that knows every key."""

from arkor_ray.storage.object_store import ObjectInfo, ObjectStore, Upload, open_store

__all__ = ["ObjectInfo", "ObjectStore", "Upload", "open_store"]
