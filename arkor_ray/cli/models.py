"""`arkor-ray models`."""

from __future__ import annotations

from arkor_ray.cli.connection import ApiUrl, AsJson, connect
from arkor_ray.cli.output import print_json


def models(api_url: ApiUrl = None, as_json: AsJson = False) -> None:
    """List the base models that jobs may name."""
    with connect(api_url) as client:
        listed = client.list_models()
    if as_json:
        print_json(listed)
        return
    for model in listed:
        print(model.get("name") or model.get("id"))
